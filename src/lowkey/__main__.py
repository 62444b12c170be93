"""`python -m lowkey`, which `accelerate launch -m lowkey` runs: the command `lowkey`."""

from lowkey_start import main

if __name__ == "__main__":
    main()
