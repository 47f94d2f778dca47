"""`python -m sa_diffusers` is the command `sa-diffusers`."""

from .commands import main

if __name__ == "__main__":
    main()
