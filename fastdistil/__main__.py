"""`python -m fastdistil`, which torchrun and accelerate can start."""

from fastdistil.cli import main

if __name__ == "__main__":
    main()
