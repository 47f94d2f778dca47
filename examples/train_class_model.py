"""Train the base model of a class experiment: a conditional VAE or a class-conditional diffusion model.

    accelerate launch examples/train_class_model.py --model mnist_vae --data ylecun/mnist --output_dir mnist-base
    accelerate launch examples/train_class_model.py --model cifar10 --data uoft-cs/cifar10 --output_dir cifar10-base

What is not said comes with the model: for `cifar10` and `stl10` the paper's 800,000 and 250,000 steps. `--without
CLASS` leaves a class out of the data: the paper's "9 classes" baseline.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm import tqdm

from sa_diffusers.configuration import BASE_DEFAULTS_NAME, LR_SCHEDULERS, SAMPLERS
from sa_diffusers.data.image_datasets import LabelledImages, augment, load_labelled_images
from sa_diffusers.families import SamplingSettings, objective_for
from sa_diffusers.files import replacing_folder, write_json
from sa_diffusers.identity import Identity, fingerprint
from sa_diffusers.models import build_class_pipeline, class_configurations, class_defaults
from sa_diffusers.processes import EXIT_INTERRUPTED, Interrupted, finishing, say, stop_requested, watching
from sa_diffusers.seeds import seed_of
from sa_diffusers.training.checkpoints import (
    TrainingState,
    checkpoints,
    choose_checkpoint,
    read_checkpoint,
    write_checkpoint,
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help=f"{', '.join(class_configurations())}, or a JSON file of the same form")
    add("--data", required=True, help="folder with IDX files or with a folder a class, parquet file, or Hub dataset")
    add("--split", nargs="+", default=["train"], help="splits to train on [train]")
    add("--labels", nargs="+", help="names of the classes [the data's]")
    add("--without", nargs="+", default=[], metavar="CLASS", help="classes left out of the data")
    add("--output_dir", type=Path, required=True)
    add("--max_train_steps", type=int, help="[as suits the model, like the four below]")
    add("--train_batch_size", type=int, help="of one device")
    add("--learning_rate", type=float)
    add("--lr_scheduler", choices=LR_SCHEDULERS)
    add("--lr_warmup_steps", type=int, default=0)
    add("--max_grad_norm", type=float, default=1.0)
    add("--condition_dropout", type=float, default=0.1, help="share trained as the null class (diffusion) [0.1]")
    add("--affine", type=float, default=0.0, help="strength of random rotation, shift and scale; 1 is light [0]")
    add("--flip", action="store_true", help="mirror half of the images")
    add("--use_ema", action=argparse.BooleanOptionalAction, default=False, help="[as suits the model]")
    add("--ema_decay", type=float, default=0.9999, help="[as suits the model]")
    add("--mixed_precision", choices=("no", "fp16", "bf16"))
    add("--checkpointing_steps", type=int, default=2000)
    add("--resume_from_checkpoint", choices=("latest",), help="go on at the newest checkpoint")
    add("--sample_steps", type=int, default=2000, help="steps between sample grids")
    add("--sampler", choices=SAMPLERS, default="ddim", help="of the sample grids [ddim]")
    add("--num_inference_steps", type=int, default=50, help="of the sample grids")
    add("--guidance_scale", type=float, default=3.0, help="of the sample grids; the paper's weight 2 is 3 here")
    add("--report_to", choices=("tensorboard", "wandb", "none"), default="tensorboard")
    add("--seed", type=int, default=0)
    args, _ = parser.parse_known_args(arguments)
    try:
        parser.set_defaults(**class_defaults(args.model, "training"))
    except ValueError as error:
        parser.error(str(error))
    args = parser.parse_args(arguments)
    for name in ("max_train_steps", "train_batch_size", "checkpointing_steps", "sample_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    set_seed(args.seed)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, args.output_dir / "logs"),
    )
    if checkpoints(args.output_dir) and not args.resume_from_checkpoint:
        raise ValueError(
            f"{checkpoints(args.output_dir)[-1]} is from an earlier training: go on there with "
            "--resume_from_checkpoint latest, or choose another --output_dir"
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
    identity = training_identity(args, data, accelerator)
    if accelerator.log_with:
        accelerator.init_trackers("class-model")
    first = 0
    if checkpoints(args.output_dir):
        newest = checkpoints(args.output_dir)[-1]
        if int(newest.name.rpartition("-")[2]) >= args.max_train_steps:
            raise ValueError(
                f"{newest} has {newest.name.rpartition('-')[2]} steps behind it: --max_train_steps "
                f"{args.max_train_steps} must be more"
            )
        choice = choose_checkpoint(args.output_dir, "latest", identity, vars(args))
        if choice.folder is None:
            raise ValueError(
                f"{newest} belongs to another model, or to other settings than these, or is not whole: leave "
                f"--resume_from_checkpoint out, or choose another --output_dir ({'; '.join(choice.notes)})"
            )
        if accelerator.is_main_process:
            for note in choice.notes:
                say(note)
        first = choice.step
        read_checkpoint(choice.folder).restore(named, optimizer, schedule, ema, accelerator.scaler)
    accelerator.print(
        f"{len(data)} images of {len(data.names)} classes, {sum(p.numel() for p in parameters):,} parameters"
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
        accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.step(parameters)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4g}")
            accelerator.log({"loss": loss.item(), "learning_rate": schedule.get_last_lr()[0]}, step=step)
        last = step + 1 == args.max_train_steps
        stopping = stop_requested()
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
                        # What train_sa.py takes up by itself.
                        write_json(staging / BASE_DEFAULTS_NAME, class_defaults(args.model))
                        write_json(staging / "training.json", {**vars(args), "output_dir": str(args.output_dir)})
                save_grid(objective, data.names, args, step + 1)
            if ema and not last:
                ema.restore(parameters)
    accelerator.end_training()
    accelerator.print(f"pipeline  {args.output_dir}")


def plain_settings(args: argparse.Namespace) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def training_identity(args: argparse.Namespace, data: LabelledImages, accelerator: Accelerator) -> Identity:
    """What the trained weights depend on."""
    places = ("output_dir", "data", "checkpointing_steps", "resume_from_checkpoint", "sample_steps", "sampler",
              "num_inference_steps", "guidance_scale", "report_to")  # fmt: skip
    settings = {name: value for name, value in plain_settings(args).items() if name not in places}
    images = fingerprint([data.names, data.labels.tolist(), int(data.pixels.long().sum()), list(data.pixels.shape)])
    return Identity("class-model", {**settings, "images": images, "processes": accelerator.num_processes})


def save_grid(objective, names: list[str], args: argparse.Namespace, step: int) -> None:
    """One row of eight samples a class."""
    settings = SamplingSettings(args.sampler, args.num_inference_steps, args.guidance_scale, batch_size=64)
    prompts = [name for name in names for _ in range(8)]
    pictures = objective.decode(objective.sample(prompts, list(range(len(prompts))), settings))
    folder = args.output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    make_image_grid(pictures, len(names), 8).save(folder / f"step-{step:06d}.png")


if __name__ == "__main__":
    try:
        with watching(), finishing():
            main()
    except Interrupted as stop:
        print(f"stopped: {stop}. Go on with --resume_from_checkpoint latest", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
