"""XLA's flags for tests. Read before JAX is imported."""

from importlib.metadata import version

# Compiling is most of the suite's time and tiny models run fast anyway. This is machine code, not the graph:
# fusion, copies and buffers are those of a real run.
FLAGS = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # Fusions by way of MLIR take 45 % of the time, parts for several threads 30 % of what is left. Later versions do
    # not know the first flag, and end.
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
