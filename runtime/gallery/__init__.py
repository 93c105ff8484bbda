"""Galleries on disk: encoded images (and captions) that survive crashes and can be searched without loading them.

    from qpert.runtime.gallery.entries import ImageEntry
    from qpert.runtime.gallery.indexing import index_images
    from qpert.runtime.gallery.reader import StoredGallery

    index_images("gallery", encoder, [ImageEntry("a.jpg", Path("a.jpg"), boxes)])   # creates, or resumes
    with StoredGallery.open("gallery", encoder) as gallery:
        gallery.images              # names in row order
        gallery.query_embeds        # float32 [n, Q, E]
        gallery.features_of([3, 5]) # ImageFeatures of those rows, read from disk (or encoded again)

On disk:

    gallery.sqlite        what is in it: one row an image, checksums of everything else, the bundle that made it
    query_embeds.<g>      float32 [n, Q, E], appended to; exact scores come from here
    codes.<g>             uint8 [n, Q, E] and code_stats.<g> float32 [n, 3]: the same in 8 bits, for the fast scan
    features/*.safetensors  image features for re-ranking, 64 images a file (absent with `recomputed`)
    text_embeds.<g>       float32 [m, E] of captions, where the images came with some

Only what `gallery.sqlite` says is there counts; it is committed after the bytes it speaks of are on the disk.
"""
