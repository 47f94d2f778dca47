"""Upload a folder to the Hub: an erased pipeline that train_sa.py wrote, or saved Fisher information.

    python examples/push_to_hub.py brad-pitt --hub_model_id USER/no-brad-pitt --private

Checkpoints and logs stay behind. Log in with `hf auth login` first.
"""

import argparse
import sys
from pathlib import Path

from sa_diffusers.configuration import CONFIG_NAME, FISHER_CONFIG_NAME
from sa_diffusers.files import read_json
from sa_diffusers.hub import push_folder
from sa_diffusers.publish import push_pipeline


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder")
    parser.add_argument("--hub_model_id", help="name on the Hub [as in the run's settings, or the folder's]")
    parser.add_argument("--private", action=argparse.BooleanOptionalAction,
                        help="make a new repository private [as in the run's settings]")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    settings = read_json(args.folder / CONFIG_NAME) if (args.folder / CONFIG_NAME).is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{args.folder / CONFIG_NAME} holds no settings: restore it or remove it")
    name = args.hub_model_id or settings.get("hub_model_id")
    private = settings.get("hub_private_repo", False) if args.private is None else args.private
    is_pipeline = (args.folder / "model_index.json").is_file()
    if (args.folder / FISHER_CONFIG_NAME).is_file() and not is_pipeline:
        from sa_diffusers import FisherInformation

        card = FisherInformation.from_pretrained(args.folder).model_card
        address = push_folder(args.folder, name, private, card, commit_message="Upload Fisher information")
    else:
        address = push_pipeline(args.folder, name, private)
    print(f"hub       {address}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
