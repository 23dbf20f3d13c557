"""The C++ operator for CPUs: built at first use (build.py), weights packed for it (weights.py), run (runner.py).

    python -m tael bench MODEL          shows what it reaches here

| file          | what                                                                                   |
|---------------|----------------------------------------------------------------------------------------|
| pool.h        | threads that spin between the short loops of a pass                                    |
| vector.h      | eight fp32 lanes: loads from stored types, sums in a fixed order, exp, norms, RoPE     |
| matrix.h      | packed formats and products: int4, int8, w8a8, fp32, fp16, bf16                        |
| attention.h   | attention to a paged cache, in chunks of keys                                          |
| operator.cpp  | whole layers: GQA and MLA (expanded and absorbed), dense and mixture of experts, MTP   |
| bandwidth.h   | a plain read of memory, as a yardstick                                                 |
| binding.cpp   | what Python sees                                                                       |
"""

from tael.engine.native.build import load_operator, obstacle
from tael.engine.native.runner import NativeRunner

__all__ = ["NativeRunner", "available", "load_operator", "obstacle"]


def available() -> bool:
    """Whether the operator can be built here."""
    return obstacle() is None
