"""Vector engines that hold the query vectors of images: qpert's own gallery, Qdrant, and PostgreSQL with pgvector.

    from qpert.runtime.stores.opening import open_store
    from qpert.runtime.stores.indexing import index_store
    from qpert.runtime.stores.searching import StoreGallery

    with open_store("postgresql://localhost/photos") as store:
        index_store(store, retriever.encoder, entries)
        hits = retriever.search("a dog", StoreGallery.open(store, retriever.encoder), where="album = 'x'")

`protocol` says what an engine has to do. Each computes the ITC score exactly: the maximum over an image's vectors, over
all images of which the filter is true. What re-ranking needs besides is read from a gallery or encoded again.
"""
