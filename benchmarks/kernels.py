"""python benchmarks/kernels.py: see formulations.py. Empty when imported: other libraries look for a package called kernels, and
from a script in this folder they find this file."""

if __name__ == "__main__":
    from formulations import main

    main()
