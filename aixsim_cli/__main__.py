"""`python -m aixsim_cli`, and `torchrun -m aixsim_cli`."""

from aixsim_cli.main import main

if __name__ == "__main__":
    main()
