"""Forward passes that several test files share, compiled without LLVM's optimizations, which take most of the time.

An eager call of a model compiles its scan again, and each operation around it separately; these compile once per shape.
"""

import jax

# For programs that are called once or twice.
QUICK = {"xla_backend_optimization_level": 0}

forward = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0], compiler_options=QUICK)
step = jax.jit(lambda model, tokens_BT, cache, count_B=None: model(tokens_BT, cache, count_B), compiler_options=QUICK)
