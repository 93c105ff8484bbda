"""Encoding as one callable, for engines that move the data themselves: Ray Data, Daft, Spark, a pool of processes.

    from qpert.runtime.batch import EncodeImages

    encode = EncodeImages("bundle", name="image")
    columns = encode({"image": ["a.jpg", "b.jpg"]})   # a batch of columns in, a batch of columns out

`qpert.runtime.batch.columns` says what comes out; `qpert index BUNDLE --from FILES` makes a gallery of it.
"""

from qpert.runtime.batch.encode import EncodeImages

__all__ = ["EncodeImages"]
