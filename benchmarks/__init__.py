"""The benchmark: this library, a hand-written loop, and the other libraries, on the same systems to the same true residual.

`make bench` makes an environment with every library that pip can install and runs `python -m benchmarks` in it. `workloads`
holds the systems, `floor` the hand-written loops, `adapters` one class for each library, `measure` the clocks, and `report` the
table, the JSON and the plot; `fence` holds back what is slow. `python -m benchmarks.gpu` is the benchmark of a GPU. Nothing
here is imported by `nablasolve`, and nothing here is a test of speed.
"""
