"""python benchmarks/kernels.py: see formulations.py.

Empty when imported, because other libraries look for a package called kernels and find this file from a
script in this folder.
"""

if __name__ == "__main__":
    from formulations import main

    main()
