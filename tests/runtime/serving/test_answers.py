"""Answers of a running service are those of the Python runtime, to the last bit, alone and among others."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from running_service import array_of, data_uri

from qpert.runtime.cli import run
from qpert.runtime.retrieval.scores import final_scores, itc_scores

TEXTS = ["a cup", "a large red circle left of a small blue square on a grey wall with a cross", "dog", "café!", "?"]


def embed(service, inputs, **more):
    answer = service.client.post("/v1/embeddings", json={"input": inputs, "encoding_format": "base64", **more})
    assert answer.status_code == 200, answer.text
    return [array_of(entry) for entry in answer.json()["data"]]


def picture(photo, boxes=None):
    return {"image": data_uri(photo), "boxes": None if boxes is None else boxes.xyxy.tolist()}


def same(got, expected):
    """Bit for bit: float32 results of the same graphs do not depend on the batch, and both encodings keep them."""
    np.testing.assert_array_equal(got, expected, strict=True)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_texts_and_pictures_in_one_request_keep_their_order(service, retriever, photos, photo_boxes, encoding):
    inputs = [TEXTS[0], picture(photos[0], photo_boxes[0]), TEXTS[1], picture(photos[1])]
    body = {
        "input": inputs,
        "encoding_format": encoding,
        "model": service.client.get("/v1/models").json()["data"][0]["id"],
    }
    answer = service.client.post("/v1/embeddings", json=body).json()
    assert [(one["object"], one["index"]) for one in answer["data"]] == [("embedding", n) for n in range(4)]
    features = retriever.encode_images([photos[0], photos[1]], [photo_boxes[0], None]).query_embeds
    texts = retriever.encode_texts(TEXTS[:2])
    for entry, expected in zip(answer["data"], [texts[0], features[0], texts[1], features[1]], strict=True):
        same(array_of(entry), expected)
        assert entry.get("shape") == (list(expected.shape) if encoding == "base64" else None)


def test_one_input_need_not_be_a_list(service, retriever, photos):
    (got,) = embed(service, TEXTS[0])
    same(got, retriever.encode_texts(TEXTS[:1])[0])
    (got,) = embed(service, picture(photos[2]))
    same(got, retriever.encode_images([photos[2]]).query_embeds[0])


def test_pictures_as_base64_alone_and_as_a_form_are_the_same(service, retriever, photos, photo_boxes):
    plain = picture(photos[0])["image"].partition(",")[2]
    files = [("input", (photos[0].name, photos[0].read_bytes())), ("input", (None, "a cup"))]
    files += [("input", (photos[1].name, photos[1].read_bytes()))]
    boxes = json.dumps([photo_boxes[0].xyxy.tolist(), None])
    form = service.client.post("/v1/embeddings", files=files, data={"boxes": boxes, "encoding_format": "base64"})
    assert form.status_code == 200, form.text
    first, text, second = [array_of(entry) for entry in form.json()["data"]]
    expected = retriever.encode_images(photos[:2], [photo_boxes[0], None]).query_embeds
    same(first, expected[0])
    same(second, expected[1])
    same(text, retriever.encode_texts(["a cup"])[0])
    same(embed(service, {"image": plain})[0], retriever.encode_images([photos[0]]).query_embeds[0])


def test_a_crowd_of_clients_gets_what_each_would_get_alone(service, retriever, photos, photo_boxes):
    rng = random.Random(5)
    words = ["a", "red", "blue", "large", "small", "circle", "square", "star", "left", "of", "above", "the", "cup"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(96)]
    which = [rng.randrange(len(photos)) for _ in range(32)]
    before = service.metric("qpert_batch_rows_count", work="text")
    with ThreadPoolExecutor(32) as clients:
        images = [clients.submit(embed, service, picture(photos[i], photo_boxes[i])) for i in which]
        got_texts = list(clients.map(lambda text: embed(service, text)[0], texts))
        got_images = [image.result()[0] for image in images]
    same(np.stack(got_texts), retriever.encode_texts(texts))
    alone = [retriever.encode_images([photos[i]], [photo_boxes[i]]).query_embeds[0] for i in range(len(photos))]
    for i, got in zip(which, got_images, strict=True):
        same(got, alone[i])
    assert service.metric("qpert_batch_rows_count", work="text") - before < len(texts), "no two texts went together"


def test_a_text_with_pictures_is_ranked_by_itm_and_itc(service, retriever, photos, photo_boxes):
    documents = [picture(photo, boxes) for photo, boxes in zip(photos, photo_boxes, strict=True)]
    answer = service.client.post("/v1/rerank", json={"query": "a cup of coffee", "documents": documents}).json()
    features = retriever.encode_images(photos, photo_boxes)
    itc = itc_scores(features.query_embeds, retriever.encode_texts(["a cup of coffee"]))
    scores = final_scores(retriever.itm_scores(features, ["a cup of coffee"]), itc)[:, 0]
    order = sorted(range(len(photos)), key=lambda i: -scores[i])
    assert answer == {"results": [{"index": i, "relevance_score": float(scores[i])} for i in order]}
    top = service.client.post("/v1/rerank", json={"query": "a cup of coffee", "documents": documents, "top_n": 1})
    assert top.json()["results"] == answer["results"][:1]


def test_a_picture_with_texts_is_ranked_as_search_texts_ranks(service, retriever, photos, photo_boxes):
    body = {"query": picture(photos[0], photo_boxes[0]), "documents": TEXTS}
    answer = service.client.post("/v1/rerank", json=body).json()
    hits = retriever.search_texts(photos[0], TEXTS, boxes=photo_boxes[0], k=len(TEXTS))
    assert [(TEXTS[one["index"]], one["relevance_score"]) for one in answer["results"]] == [
        (hit.text, hit.score) for hit in hits
    ]


@pytest.mark.parametrize(("k", "rerank"), [(3, None), (10, 2), (2, 0)])
def test_a_search_is_the_document_of_the_command(service, photo_gallery, capfd, k, rerank):
    body = {"text": "a rocket", "k": k} | ({} if rerank is None else {"rerank": rerank})
    answer = service.client.post("/v1/search", json=body).json()
    assert (
        run(
            [
                "search",
                str(photo_gallery),
                "a rocket",
                "-k",
                str(k),
                *([] if rerank is None else ["--rerank", str(rerank)]),
                "--json",
            ]
        )
        == 0
    )
    assert answer == json.loads(capfd.readouterr().out)


def test_searches_at_the_same_time_get_what_each_would_get_alone(service, retriever, photo_gallery):
    texts = [f"a {colour} {thing}" for colour in ("red", "blue", "grey") for thing in ("cup", "rocket", "cat", "suit")]

    def hits(text):
        return service.client.post("/v1/search", json={"text": text, "k": 3}).json()["hits"]

    with ThreadPoolExecutor(12) as clients:
        got = list(clients.map(hits, texts))
    with retriever.open_gallery(photo_gallery) as gallery:
        assert got == [[vars(hit) for hit in retriever.search(text, gallery, k=3)] for text in texts]


def test_a_picture_finds_captions_of_the_gallery(service, retriever, photos, photo_boxes, photo_gallery):
    answer = service.client.post("/v1/search", json=picture(photos[0], photo_boxes[0]) | {"k": 4}).json()
    with retriever.open_gallery(photo_gallery) as gallery:
        owners = [gallery.images[row] for row in gallery.image_of_text]
        hits = retriever.search_texts(photos[0], gallery.texts, boxes=photo_boxes[0], k=4)
        image_of = dict(zip(gallery.texts, owners, strict=True))
    assert answer["query"] == "image"
    assert answer["hits"] == [vars(hit) | {"image": image_of[hit.text]} for hit in hits]


def test_a_picture_of_the_gallery_is_shown_with_its_boxes(service, photo_gallery, retriever):
    names = service.client.get("/v1/images", params={"limit": 2, "offset": 1}).json()
    with retriever.open_gallery(photo_gallery) as gallery:
        assert names == {"images": list(gallery.images[1:3]), "total": 4}
        row = gallery.images.index("images/astronaut.jpg")
        boxes = gallery.boxes_of(row).xyxy.tolist()
    shown = service.client.get("/v1/images/images/astronaut.jpg").json()
    assert (shown["width"], shown["height"], shown["boxes"]) == (512, 512, boxes)
    assert shown["thumbnail"].startswith("data:image/jpeg;base64,/9j/")
    assert shown["captions"] == ["a cup of coffee"]  # the captions of this gallery are in the order of file names
