"""Upload a folder to the Hub: an erased pipeline that train_sa.py wrote, or saved Fisher information.

python examples/push_to_hub.py brad-pitt --hub_model_id USER/no-brad-pitt --private
"""

from sa_diffusers.commands.push import main

if __name__ == "__main__":
    main()
