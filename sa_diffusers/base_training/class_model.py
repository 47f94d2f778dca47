"""Training the base model of a class experiment: a conditional VAE or a class-conditional diffusion model."""

import contextlib
import dataclasses
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm import tqdm

from ..configuration import BASE_DEFAULTS_NAME, ClassModelConfig
from ..data.image_datasets import LabelledImages, augment, load_labelled_images
from ..environment import chosen_tracker, launched, tracked
from ..families import Objective, SamplingSettings, objective_for
from ..files import read_json, replacing_folder, write_json
from ..identity import Identity, fingerprint
from ..models import build_class_pipeline, class_defaults
from ..output_folder import OutputFolder
from ..processes import Interrupted, say, stop_requested
from ..seeds import seed_of
from ..training.checkpoints import TrainingState, checkpoints, choose_checkpoint, read_checkpoint, write_checkpoint
from .folder import check_is_own

_FINISHED_NAME = "training.json"


def train_class_model(args: ClassModelConfig) -> None:
    """Train, and write the pipeline with the settings that suit its erasure.

    Raises:
        ValueError: The data, or an earlier training in the folder, does not fit the settings, or the folder holds
            something else, or is in use.
        FloatingPointError: The training has diverged. The last checkpoint is from before.
        Interrupted: The process is to stop; a checkpoint of the step it is at is written.
    """
    set_seed(args.seed)
    check_is_own(args.output_dir, _FINISHED_NAME, ("logs", "samples"))
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision fp16 needs a CUDA device and there is none: give bf16 or no")
    accelerator = launched(
        args.mixed_precision,
        log_with=chosen_tracker(args.report_to),
        project_config=ProjectConfiguration(args.output_dir, args.output_dir / "logs"),
    )
    data = load_labelled_images(args.data, args.split[0])
    for split in args.split[1:]:
        data = data.joined(load_labelled_images(args.data, split))
    if args.labels:
        if len(args.labels) != len(data.names):
            raise ValueError(f"--labels names {len(args.labels)} classes, the data has {len(data.names)}")
        data.names = args.labels
    if args.without:
        data = data.without(args.without)
    with OutputFolder(args.output_dir).lock if accelerator.is_main_process else contextlib.nullcontext():
        _train(args, accelerator, data)


def _train(args: ClassModelConfig, accelerator: Accelerator, data: LabelledImages) -> None:
    pipeline = build_class_pipeline(args.model, data.names)
    objective = objective_for(pipeline)
    data = data.fitted(objective.resolution, objective.channels)
    objective.to(accelerator.device)
    module = objective.module.train()
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    ema = EMAModel(parameters, decay=args.ema_decay) if args.use_ema else None
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    named = dict(module.named_parameters())
    identity, goes_on = training_identity(args, data, accelerator), args.resume_from_checkpoint == "latest"
    if goes_on and _is_finished(args.output_dir, identity):
        accelerator.print(
            f"{args.output_dir} holds this very training: nothing is trained (--resume_from_checkpoint no would)"
        )
        accelerator.end_training()
        return
    if accelerator.log_with:
        accelerator.init_trackers("class-model", tracked(plain_settings(args)))
    first = 0
    if goes_on and checkpoints(args.output_dir):
        newest = checkpoints(args.output_dir)[-1]
        if int(newest.name.rpartition("-")[2]) >= args.max_train_steps:
            raise ValueError(
                f"{newest} has {newest.name.rpartition('-')[2]} steps behind it: --max_train_steps "
                f"{args.max_train_steps} must be more"
            )
        choice = choose_checkpoint(args.output_dir, "latest", identity, dataclasses.asdict(args))
        if choice.folder is None:
            raise ValueError(
                f"{newest} belongs to another model, or to other settings than these, or is not whole: start "
                f"over with --resume_from_checkpoint no, or choose another --output_dir ({'; '.join(choice.notes)})"
            )
        if accelerator.is_main_process:
            for note in choice.notes:
                say(note)
        first = choice.step
        read_checkpoint(choice.folder).restore(named, optimizer, schedule, ema, accelerator.scaler)
    accelerator.print(
        f"{len(data)} images of {len(data.names)} classes, {sum(p.numel() for p in parameters):,} parameters"
    )
    if args.lr_warmup_steps >= args.max_train_steps:
        accelerator.print(
            f"warning: --lr_warmup_steps {args.lr_warmup_steps} is all of the training: the learning rate never comes "
            "to its height"
        )
    null = len(data.names)
    drop = args.condition_dropout if objective.num_train_timesteps > 1 else 0.0
    bar = tqdm(range(first, args.max_train_steps), initial=first, total=args.max_train_steps, unit="step",
               disable=not accelerator.is_main_process)  # fmt: skip
    for step in bar:
        # A function of the step alone, so that a resumed run draws what an unbroken one would.
        generator = torch.Generator().manual_seed((args.seed * 10_007 + step) * 1009 + accelerator.process_index)
        rows = torch.randint(len(data), (args.train_batch_size,), generator=generator)
        images = augment(data.pixels[rows].float() / 127.5 - 1, args.affine, args.flip, generator)
        samples = objective.encode_images(images.to(accelerator.device), step)
        labels = data.labels[rows].clone()
        labels[torch.rand(len(labels), generator=generator) < drop] = null
        timesteps = objective.path.draw_timesteps(len(rows), generator).to(accelerator.device)
        conditions = {"class_labels": labels.to(accelerator.device)}
        noise = objective.draw_noise(samples, generator)
        torch.manual_seed(seed_of("dropout", args.seed, step))
        with accelerator.autocast():
            loss = objective.negative_elbo(wrapped, samples, conditions, timesteps, noise).mean()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        # A gradient scaler leaves such a step out, and finds another scale.
        if accelerator.scaler is None and not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite at step {step + 1}: lower --learning_rate")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.step(parameters)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4g}")
            accelerator.log({"loss": loss.item(), "learning_rate": schedule.get_last_lr()[0]}, step=step)
        last = step + 1 == args.max_train_steps
        stopping = _any_stops(accelerator)
        if (step + 1) % args.checkpointing_steps == 0 and not last or stopping:
            if accelerator.is_main_process:
                state = TrainingState.of(step + 1, named, optimizer, schedule, ema, accelerator.scaler)
                write_checkpoint(args.output_dir, state, identity, plain_settings(args), 1)
            accelerator.wait_for_everyone()
            if stopping:
                raise Interrupted(f"{stopping} after step {step + 1}")
        if last or (step + 1) % args.sample_steps == 0:
            if ema:
                ema.store(parameters)
                ema.copy_to(parameters)
            if accelerator.is_main_process:
                if last:
                    module.eval()
                    with replacing_folder(args.output_dir) as staging:
                        objective.save(staging)
                        # What an erasure takes up by itself.
                        write_json(staging / BASE_DEFAULTS_NAME, class_defaults(args.model))
                        write_json(staging / _FINISHED_NAME, {**plain_settings(args), "identity": identity.digest})
                save_grid(objective, data.names, args, step + 1)
            if ema and not last:
                ema.restore(parameters)
    accelerator.end_training()
    accelerator.print(f"pipeline  {args.output_dir}")


def _is_finished(folder: Path, identity: Identity) -> bool:
    """Whether the folder holds the pipeline of this very training.

    Raises:
        ValueError: It holds that of another.
    """
    file = folder / _FINISHED_NAME
    if not file.is_file():
        return False
    if read_json(file).get("identity") != identity.digest:
        raise ValueError(
            f"{folder} holds a model of other settings or images ({_FINISHED_NAME} has them): choose another "
            "--output_dir, or train it anew with --resume_from_checkpoint no"
        )
    return True


def _any_stops(accelerator: Accelerator) -> str | None:
    """Why all processes are to stop after this step: a signal may reach one alone."""
    reason = stop_requested()
    if accelerator.num_processes > 1:
        asked = torch.tensor(float(reason is not None), device=accelerator.device)
        if accelerator.reduce(asked) > 0:
            return reason or "another process was asked to stop"
    return reason


def plain_settings(args: ClassModelConfig) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(args).items()}


def training_identity(args: ClassModelConfig, data: LabelledImages, accelerator: Accelerator) -> Identity:
    """What the trained weights depend on."""
    places = ("output_dir", "data", "checkpointing_steps", "resume_from_checkpoint", "sample_steps", "sampler",
              "num_inference_steps", "guidance_scale", "report_to")  # fmt: skip
    settings = {name: value for name, value in plain_settings(args).items() if name not in places}
    images = fingerprint([data.names, data.labels.tolist(), int(data.pixels.long().sum()), list(data.pixels.shape)])
    return Identity("class-model", {**settings, "images": images, "processes": accelerator.num_processes})


def save_grid(objective: Objective, names: list[str], args: ClassModelConfig, step: int) -> None:
    """One row of eight samples a class."""
    settings = SamplingSettings(args.sampler, args.num_inference_steps, args.guidance_scale, batch_size=64)
    prompts = [name for name in names for _ in range(8)]
    pictures = objective.decode(objective.sample(prompts, list(range(len(prompts))), settings))
    folder = args.output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    make_image_grid(pictures, len(names), 8).save(folder / f"step-{step:06d}.png")
