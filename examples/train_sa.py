"""Make a text-to-image model forget a concept.

accelerate launch examples/train_sa.py --concept "Brad Pitt" --surrogate "a middle aged man"
"""

import sys

from sa_diffusers.command_line import parse_config


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(arguments)
    # Imported late: these take seconds, and a mistake on the command line should not.
    from sa_diffusers.erasure import Erasure
    from sa_diffusers.evaluation.comparison import GRID_NAME, REPORT_NAME
    from sa_diffusers.hub import push_folder

    try:
        erasure = Erasure(config)
        say = erasure.accelerator.print
        say(f"\nPlan\n{erasure.plan()}\n")
        comparison = erasure.run()
        say(f"\n{comparison.table()}\n")
        say(f"pipeline  {erasure.output_dir}")
        say(f"report    {erasure.output_dir / REPORT_NAME}")
        say(f"pictures  {erasure.output_dir / GRID_NAME}")
        if config.push_to_hub and erasure.accelerator.is_main_process:
            say(f"hub       {push_folder(erasure.output_dir, config.hub_model_id, config.hub_private_repo)}")
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
