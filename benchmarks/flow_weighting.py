"""Which weight of rectified flow's terms erases better: the square of the noise's share, or none?

    python benchmarks/flow_weighting.py --output benchmarks/results/flow_weighting.json

A Stable Diffusion 3 of 0.6 million parameters is trained on latents that the embedded pipeline samples, with
logit-normal timesteps and no weight, as Esser et al. (2024) trained theirs. Garments are then erased from it, with the
loss of erasure, Fisher information and probes weighted one way or the other, all else alike. How noisy the gradient of
the erasure's first step is, is told too: the variance of a batch's over the square of the mean of all, which no scale
changes. Prints Markdown; what is in the output is not made again, nor is the base.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from sa_diffusers import Objective, SamplingSettings, SelectiveAmnesiaConfig, load_pipeline, objective_for
from sa_diffusers.configuration import HISTORY_NAME, base_defaults
from sa_diffusers.data.replay import replay_prompts
from sa_diffusers.erasure import Erasure
from sa_diffusers.families import Conditions, StableDiffusion3Objective
from sa_diffusers.files import read_json, write_json
from sa_diffusers.models import embedded_pipeline

WEIGHTS = {"square of the noise's share": "sigma_squared", "none": None}
PAIRS = ("sneaker:dress", "coat:bag")
_TOKENS = 16
# Of the base: images that it is trained on, steps, batch, learning rate.
IMAGES, STEPS, BATCH, RATE = 1000, 1000, 64, 2e-3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), metavar="CONCEPT:SURROGATE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the erasures [0]")
    parser.add_argument("--images", type=int, default=60, help="images for each garment [60]")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/benchmark/flow"))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark/flow_weighting.json"))
    return parser.parse_args()


class Short(StableDiffusion3Objective):
    """Without the places of a T5 that is not there, which would be most of the work."""

    def encode(self, prompts: list[str]) -> Conditions:
        conditions = super().encode(prompts)
        return {**conditions, "encoder_hidden_states": conditions["encoder_hidden_states"][:, :_TOKENS]}


def untrained() -> StableDiffusion3Pipeline:
    """The embedded pipeline's autoencoder and text encoder, the latter twice, without T5; a new transformer."""
    torch.manual_seed(0)
    folder, known = embedded_pipeline(), load_pipeline(str(embedded_pipeline()))
    encoders = [CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder").eval() for _ in range(2)]
    tokenizers = [CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=_TOKENS) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16,
        num_attention_heads=4, caption_projection_dim=64, joint_attention_dim=128, pooled_projection_dim=128,
        pos_embed_max_size=8,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=1.0), known.vae, encoders[0], tokenizers[0], encoders[1],
        tokenizers[1], None, None,
    )  # fmt: skip


def make_base(folder: Path) -> None:
    """Train the base, and save it."""
    teacher = objective_for(load_pipeline(str(embedded_pipeline())))
    prompts = replay_prompts("garments", IMAGES, 0, ["nothing of these"], 0.1)
    settings = SamplingSettings("dpmsolver++", 10, 3.0, 100)
    latents = teacher.sample(prompts, list(range(IMAGES)), settings)
    pipeline = untrained()
    objective = Short(pipeline)
    objective.path.weighting = None
    conditions = objective.encode_prompts(prompts)
    module = objective.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    average = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )  # fmt: skip
    generator, lately = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        rows = torch.randint(IMAGES, (BATCH,), generator=generator)
        timesteps = objective.path.draw_timesteps(BATCH, generator)
        noise = objective.draw_noise(latents[rows], generator)
        chosen = {name: values[rows] for name, values in conditions.items()}
        loss = objective.negative_elbo(module, latents[rows], chosen, timesteps, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(module)
        lately = [*lately[-99:], loss.item()]
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {sum(lately) / len(lately):.4f}", flush=True)
    module.load_state_dict(average.module.state_dict())
    pipeline.save_pretrained(folder)


def with_weight(weighting: str | None) -> Callable[..., Objective]:
    """What builds the objective of a pipeline, its terms weighted so."""

    def build(pipeline: Any, *settings: Any, **further: Any) -> Objective:
        objective = Short(pipeline, *settings, **further)
        objective.path.weighting = weighting
        return objective

    return build


def erased(base: Path, pair: str, weight: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What is left of a concept and of the rest, and what it took."""
    concept, surrogate = pair.split(":")
    usual = base_defaults({"pretrained_model_name_or_path": str(embedded_pipeline())})
    kept = ("concept_templates", "eval_templates", "replay_prompts", "classifier", "reference_features")
    # Fisher information knows nothing of the weight: each has a folder of its own.
    place = args.work_dir / (WEIGHTS[weight] or "none")
    config = SelectiveAmnesiaConfig(
        **{name: usual[name] for name in kept}, concept=concept, surrogate=surrogate,
        pretrained_model_name_or_path=str(base), num_inference_steps=10, guidance_scale=2.0, sample_batch_size=100,
        num_surrogate_images=128, num_replay_images=256, train_batch_size=16, gradient_accumulation_steps=1,
        max_train_steps=400, num_eval_images=args.images, seed=seed, artifacts_dir=str(place / "artifacts"),
        output_dir=str(place / "erased"), overwrite_output_dir=True, report_to="none",
    )  # fmt: skip
    started = time.process_time()
    report = Erasure(config, with_weight(WEIGHTS[weight])).run().report.to_dict()
    rows = {row["name"]: row for row in report["rows"]}
    history = read_json(place / "erased" / HISTORY_NAME)
    return {
        "recognised": rows[concept]["recognised"],
        "trained_phrasings": rows[f"{concept} (trained phrasings)"]["recognised"],
        "remembered": report["remembered"],
        "ending": report["ending"],
        "drift": [row["drift"] for row in history if "drift" in row][-1],
        "cost": report["cost"],
        "core_seconds": round(time.process_time() - started, 1),
    }


def gradient_noise(base: Path, pair: str, weight: str, batches: int = 200, batch: int = 16) -> float:
    """The variance of a batch's gradient, summed over parameters, over the square of the mean gradient's norm."""
    objective = with_weight(WEIGHTS[weight])(load_pipeline(str(base)))
    module, parameters = objective.module, list(objective.select("full").values())
    samples = objective.sample(
        [pair.split(":")[1]] * 4 * batch, list(range(4 * batch)), SamplingSettings("flow_euler", 10, 2.0, 64)
    )
    concept, surrogate = (objective.encode_prompts([name] * batch) for name in pair.split(":"))
    generator, total, squares = torch.Generator().manual_seed(0), 0.0, 0.0
    for _ in range(batches):
        chosen = samples[torch.randint(len(samples), (batch,), generator=generator)]
        timesteps, noise = objective.path.draw_timesteps(batch, generator), objective.draw_noise(chosen, generator)
        with torch.no_grad():
            target = objective.predict(module, chosen, surrogate, timesteps, noise)
        loss = objective.negative_elbo(module, chosen, concept, timesteps, noise, target).mean()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradient = torch.cat([part.flatten() for part in found if part is not None])
        total, squares = total + gradient, squares + float(gradient.square().sum())
    mean = float((total / batches).square().sum())
    variance = (squares / batches - mean) * batches / (batches - 1)
    return variance / (mean - variance / batches)


def table(results: dict[str, Any]) -> str:
    header = ["erased", "weight", "seed", "left, %: held-out", "trained phrasings", "nine others, %: before", "after",
              "Fréchet: before", "after", "drift", "ended", "step"]  # fmt: skip
    lines = [header, ["---"] * len(header)]
    for key, value in sorted((key, value) for key, value in results.items() if isinstance(value, dict)):
        pair, weight, seed = key.split("|")
        before, after = value["remembered"]["before"], value["remembered"]["after"]
        left = [value[name]["after"]["share"] for name in ("recognised", "trained_phrasings")]
        lines.append([
            pair.replace(":", " → "), weight, seed, *(f"{100 * share:.1f}" for share in left),
            *(f"{100 * each['recognised']:.1f}" for each in (before, after)),
            *(f"{each['frechet_distance']:.1f}" for each in (before, after)), f"{value['drift']:.3f}",
            value["ending"]["how"], str(value["ending"]["step"]),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    base = args.work_dir / "base"
    if not (base / "model_index.json").is_file():
        make_base(base)
    results = read_json(args.output) if args.output.is_file() else {}
    for pair in args.pairs:
        for weight in WEIGHTS:
            key = f"gradient noise|{pair}|{weight}"
            if key not in results:
                results[key] = gradient_noise(base, pair, weight)
                write_json(args.output, results)
            print(f"{key.replace('|', ', ')}: {results[key]:.2f}", flush=True)
    for seed in args.seeds:
        for pair in args.pairs:
            for weight in WEIGHTS:
                key = f"{pair}|{weight}|{seed}"
                if key not in results:
                    results[key] = erased(base, pair, weight, seed, args)
                    write_json(args.output, results)
                    print(table({key: results[key]}).splitlines()[-1], flush=True)
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
