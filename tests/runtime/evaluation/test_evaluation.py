"""`qpert eval` and its parts on small sets, in the tiny model with boxes in ITC and ITM."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_sets import SIZE, WORDS, read_annotation, write_annotation, write_entities, write_set

from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.cli import run
from qpert.runtime.errors import BoxError, InputError, QpertWarning, UnavailableError
from qpert.runtime.evaluation.evaluate import evaluate, overridden
from qpert.runtime.evaluation.inputs import demo_folder, open_data
from qpert.runtime.evaluation.published import published_for
from qpert.runtime.evaluation.report import evaluation_report, notes, published_table
from qpert.runtime.evaluation.running import ImagesInMemory, score_pairs
from qpert.runtime.evaluation.work import Binding, check_room, open_work
from qpert.runtime.inputs.datasets import RetrievalDataset
from qpert.runtime.inputs.perturbation import Perturbation
from qpert.runtime.progress import Silent
from qpert.runtime.report.html import to_html
from qpert.runtime.retrieval.encoder import Encoder
from qpert.runtime.retrieval.scores import itc_scores, ranking


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "set")


@pytest.fixture(scope="module")
def encoder(tiny_bundle):
    encoder = Encoder(Bundle.open(tiny_bundle), "cpu", threads=1)
    yield encoder
    encoder.close()


@pytest.fixture(scope="module")
def data(root):
    return open_data(root)


@pytest.fixture(scope="module")
def whole(encoder, data):
    """Everything re-ranked, in memory."""
    return evaluate(encoder, data)


def own_json(capsys, *arguments, code=0):
    """What a command line printed: its one JSON document, and stderr."""
    assert run([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    return (json.loads(out) if code == 0 else out), err


def page_of(evaluation):
    return to_html(evaluation_report(evaluation))


def numbers(report):
    """What has to be the same each time."""
    return {key: value for key, value in report.items() if key not in ("seconds", "resumed", "environment")}


# Results


def test_the_json_has_what_others_rely_on_and_is_kept_in_the_bundle(tiny_bundle, root, copy_of, capsys):
    bundle = copy_of(tiny_bundle)
    report, _ = own_json(capsys, "eval", bundle, "--dataset", root, "--threads", 1, "--json")
    for way in ("t2i", "i2t"):
        assert {"r1", "r5", "r10", "mr1", "mr5", "mr10"} <= set(report[way])
        assert {"r1", "r5", "r10"} <= set(report["small"][way])
    assert (report["images"], report["texts"], report["itm_pairs"]) == (6, 12, 72)
    assert (report["small"]["images"], report["small"]["queries"]) == (2, 4)  # squares of 4 and 11 pixels on 60×40
    assert {"images", "texts", "itc", "pairs", "total"} <= set(report["seconds"])
    # 6 images leave bins empty, so mR@K is undefined, with a reason
    assert report["t2i"]["mr1"] is None
    assert "no queries in size bin" in report["t2i"]["mr1_reason"]
    assert json.loads((bundle / "reports" / "eval.json").read_text()) == report
    page = (bundle / "reports" / "eval.html").read_text()
    assert f"{report['t2i']['r1']:.2f}" in page
    assert run(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files_ok"]


def test_ranks_are_those_of_every_pair_matched_on_its_own(encoder, data, whole):
    captions, owners = data.dataset.captions, data.dataset.image_of_caption
    features = encoder.encode_images(data.dataset.images, data.boxes)
    itc = itc_scores(features.query_embeds, encoder.encode_texts(captions))
    itm = np.array(
        [[encoder.itm_scores(features.rows([i]), [caption])[0, 0] for caption in captions] for i in range(6)]
    )
    gaps = np.diff(np.sort(itm + itc, axis=0), axis=0)
    assert gaps.min() > 1e-5, "closer scores could change places by rounding"
    for text in range(12):
        np.testing.assert_array_equal(whole.scores.images_for(text), ranking(itm[:, text] + itc[:, text]))
    for image in range(6):
        np.testing.assert_array_equal(whole.scores.texts_for(image), ranking(itm[image] + itc[image]))
    found = whole.scores.t2i_ranks(owners)
    assert whole.metrics.t2i.recall[1] == pytest.approx(100 * np.mean(found == 0))
    assert whole.itc.t2i.recall[5] == pytest.approx(
        100 * np.mean([owner in ranking(itc[:, text])[:5] for text, owner in enumerate(owners)])
    )


def test_no_text_of_a_call_is_longer_than_the_bundle_takes_and_none_is_matched_twice(encoder, data, monkeypatch):
    calls = []
    session = encoder.sessions["itm"]

    class Recorder:
        spec = session.spec

        def run(self, inputs):
            calls.append(inputs["attention_mask"])
            return session.run(inputs)

    monkeypatch.setitem(encoder.sessions, "itm", Recorder())
    scores = evaluate(encoder, data, rerank=2).scores
    assert sum(call.shape[1] for call in calls) == len(scores.schedule)
    assert all(call.shape[0] == 1 and call.shape[1] <= 6 for call in calls)  # one image a call, T = 6 at most
    assert all(call.sum(axis=2).max() == call.shape[2] for call in calls), "padded beyond the longest text"


def test_a_set_of_one_image_is_found_at_once(tmp_path, encoder):
    data = open_data(write_set(tmp_path, images=1, captions=1))
    found = evaluate(encoder, data, rerank=64)
    assert (found.metrics.t2i.recall[1], found.metrics.i2t.recall[1], found.itm_pairs) == (100, 100, 1)


def test_without_reranking_nothing_is_matched_and_recall_is_that_of_itc(encoder, data, whole):
    found = evaluate(encoder, data, rerank=0)
    assert (found.itm_pairs, found.metrics.to_dict()) == (0, whole.itc.to_dict())


# Boxes


def test_boxes_that_perturb_and_boxes_that_sort_are_chosen_apart(tmp_path, root, encoder, whole):
    lines = [
        {"image": f"{image:04d}.png", "x1": 0, "y1": 0, "x2": 60, "y2": 39} for image in range(6)
    ]  # nearly the whole picture
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = str(tmp_path / "boxes.jsonl")
    perturbed = open_data(root, boxes=file, bin_boxes="entities")
    sorted_ = open_data(root, boxes="entities", bin_boxes=file)
    np.testing.assert_allclose(sorted_.largest_areas, 39 / 40)
    np.testing.assert_allclose(perturbed.largest_areas[0], 4 * 4 / (60 * 40))
    assert "6 boxes on 6 of 6 images" in perturbed.boxes_from
    by_file, by_entities = evaluate(encoder, perturbed), evaluate(encoder, sorted_)
    np.testing.assert_array_equal(by_entities.scores.itm, whole.scores.itm)
    assert by_entities.metrics.t2i.bins[9].queries == 12
    assert np.abs(by_file.scores.itm - whole.scores.itm).max() > 1e-3, "boxes that change nothing would show nothing"


def test_without_boxes_scores_are_those_of_zero_weights_and_images_are_sorted_all_the_same(root, tiny_bundle, whole):
    data = open_data(root, boxes="none")
    assert data.bins_from.startswith("Entities")
    still = Encoder(Bundle.open(tiny_bundle), "cpu", overridden(whole.perturbation, alpha=0.0), threads=1)
    plain, zero = evaluate(still, data), evaluate(still, replace(data, boxes=open_data(root).boxes))
    still.close()
    np.testing.assert_allclose(plain.scores.itm, zero.scores.itm, rtol=0, atol=1e-5)  # other shapes, other rounding
    assert plain.metrics.t2i.bins[0].queries == 4
    assert np.abs(plain.scores.itm - whole.scores.itm).max() > 1e-3


def test_a_box_file_without_any_of_the_images_is_refused_with_names(root, tmp_path):
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2\nelsewhere.jpg,0,0,5,5\n")
    with pytest.raises(
        InputError, match=r"for none of the 6 images; it has boxes of elsewhere.jpg, the data set has flickr30k-im"
    ):
        open_data(root, boxes=str(tmp_path / "boxes.csv"))


def test_a_box_file_may_have_other_images_too_and_that_is_said(root, tmp_path):
    names = ["0002.png", "elsewhere/1.png", "0003.jpg", "0003.png"]
    rows = [f"{name},0,0,{place + 5},5" for place, name in enumerate(names)]
    (tmp_path / "boxes.csv").write_text("\n".join(["image,x1,y1,x2,y2", *rows]))
    with pytest.warns(QpertWarning, match="has boxes of 2 images that are not among those evaluated: elsewhere/1.png"):
        data = open_data(root, boxes=str(tmp_path / "boxes.csv"))
    assert [boxes.xyxy.tolist() for boxes in data.boxes[2:4]] == [[[0, 0, 5, 5]], [[0, 0, 8, 5]]]
    assert "2 boxes on 2 of 6 images" in data.boxes_from


def test_one_name_for_two_images_is_ambiguous_in_an_evaluation_too(tmp_path):
    root = write_set(tmp_path, images=2)
    entries = read_annotation(root)
    for entry, folder in zip(entries, ("x", "y"), strict=True):
        (root / folder).mkdir()
        (root / entry["image"]).rename(root / folder / "a.png")
        entry["image"] = f"{folder}/a.png"
    write_annotation(root, entries)
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2\na.png,0,0,5,5\n")
    with pytest.raises(BoxError) as caught:
        open_data(root, boxes=str(tmp_path / "boxes.csv"), bin_boxes="none")
    assert caught.value.code == "box-image-ambiguous"


def test_bad_boxes_can_be_left_out_of_an_evaluation(root, tmp_path):
    rows = ["0002.png,0,0,5,5", "0002.png,7,0,7,5", "0003.png,300,0,305,5"]
    (tmp_path / "boxes.csv").write_text("\n".join(["image,x1,y1,x2,y2", *rows]))
    with pytest.raises(BoxError) as caught:
        open_data(root, boxes=str(tmp_path / "boxes.csv"))
    assert caught.value.code == "box-empty"
    with pytest.warns(QpertWarning) as said:
        data = open_data(root, boxes=str(tmp_path / "boxes.csv"), skip_bad_boxes=True)
    assert [len(boxes) for boxes in data.boxes] == [0, 0, 1, 0, 0, 0]
    messages = [str(one.message) for one in said]
    assert any("1 of 3 boxes cannot be used and are left out" in message for message in messages)
    assert any(
        "1 boxes outside flickr30k-images/0003.png (60×40 pixels) are left out" in message for message in messages
    )


def test_a_caption_of_punctuation_alone_is_scored_as_the_empty_text(tmp_path, encoder):
    root = write_set(tmp_path, images=2)
    entries = read_annotation(root)
    entries[0]["caption"][1] = "..."
    write_annotation(root, entries)
    with pytest.warns(QpertWarning, match="hold no word"):
        found = evaluate(encoder, open_data(root, boxes="none"), rerank=2)
    assert np.isfinite(found.scores.itc).all()
    assert found.scores.itc.shape == (2, 4)


def test_more_boxes_than_the_bundle_takes_are_refused_before_anything_is_encoded(root, tmp_path, encoder):
    rows = [f"0002.png,{x},0,{x + 3},5" for x in range(7)]
    (tmp_path / "boxes.csv").write_text("\n".join(["image,x1,y1,x2,y2", *rows]))
    with pytest.raises(InputError, match=r"1 images have more boxes than the 4 .*0002.png has 7; .*--max-boxes 7"):
        evaluate(encoder, open_data(root, boxes=str(tmp_path / "boxes.csv")))


def test_a_bundle_that_takes_no_boxes_is_evaluated_without_and_refuses_settings(stock_export, root, copy_of, capsys):
    bundle = copy_of(stock_export.folder)
    report, said = own_json(capsys, "eval", bundle, "--dataset", root, "--rerank", 2, "--threads", 1, "--json")
    assert report["boxes"] == "no boxes"
    assert report["small"]["images"] == 2
    assert "boxes that perturb: no boxes; boxes that sort by size: Entities" in said
    _, said = own_json(capsys, "eval", bundle, "--dataset", root, "--alpha", 2, code=2)
    assert "--perturb none, so --alpha would change nothing" in said
    _, said = own_json(capsys, "eval", bundle, "--dataset", root, "--boxes", "entities", code=2)
    assert "takes no boxes; evaluate with --boxes none" in said


def test_settings_of_the_command_line_act_and_are_reported(tiny_bundle, root, copy_of, capsys, whole):
    arguments = ("eval", copy_of(tiny_bundle), "--dataset", root, "--rerank", 3, "--threads", 1, "--json")
    report, _ = own_json(capsys, *arguments, "--alpha", 2, "--gamma", -1, "--reduction", "mean")
    said = report["perturbation"]
    assert (said["alpha"], said["gamma"], said["reduction"]) == (2, -1, "mean")
    assert (said["threshold"], said["stages"]) == (whole.perturbation.threshold, "both")


def test_a_reading_replaces_reduction_and_coverage_and_leaves_what_the_graphs_fix():
    exported = Perturbation(alpha=4, threshold=0.9, stages="both", preserve_norm=True, centre_keys=True)
    release = overridden(exported, semantics="release")
    assert (release.reduction, release.coverage) == ("mean", "dilated")
    assert (release.alpha, release.threshold, release.stages) == (4, 0.9, "both")
    assert release.preserve_norm
    assert release.centre_keys
    assert overridden(exported, semantics="release", beta=1.0, gamma=-1.0).beta == 0  # the release reads 1−S as −S
    assert overridden(exported, semantics="release", coverage="binary", alpha=3.0).coverage == "binary"
    assert overridden(release, semantics="paper").reduction == "sum"
    assert overridden(exported) == exported


def test_the_releases_reading_of_corners_moves_an_image_across_a_bin_edge(tmp_path, capsys, tiny_bundle, copy_of):
    # A square of 31 pixels on 60×40 covers 961/2400 = 0.4004 of it, but 900/2400 once a row and a column are lost.
    root = write_set(tmp_path / "set", images=2, sides=[31, 31])
    arguments = ("eval", copy_of(tiny_bundle), "--dataset", root, "--rerank", 1, "--threads", 1, "--json")
    report, _ = own_json(capsys, *arguments)
    assert [one["images"] for one in report["bins"]] == [0, 0, 0, 0, 2, 0, 0, 0, 0, 0]
    report, _ = own_json(capsys, *arguments, "--semantics", "release")
    assert [one["images"] for one in report["bins"]] == [0, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    report, _ = own_json(capsys, *arguments, "--semantics", "release", "--xml-coordinates", "one_based_inclusive")
    assert report["bins"][4]["images"] == 2


# Interruption


class Stopping(Encoder):
    """An encoder that is interrupted after so many images of the pair stage."""

    def __init__(self, encoder, after):
        self.encoder, self.after, self.calls = encoder, after, 0

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def itm_scores(self, features, texts):
        self.calls += 1
        if self.calls > self.after:
            raise KeyboardInterrupt
        return self.encoder.itm_scores(features, texts)


def test_an_interrupted_evaluation_goes_on_and_computes_no_pair_twice(encoder, data, whole, tmp_path):
    work = open_work(tmp_path / "work", Binding.of(encoder, data, "cpu"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(Stopping(encoder, 4), data, work=work)
    second = Stopping(encoder, 99)
    found = evaluate(second, data, work=work)
    assert second.calls == 2
    assert found.resumed == {"images": 6, "texts": 12, "pairs": 48}
    np.testing.assert_array_equal(found.scores.itm, whole.scores.itm)
    assert numbers(found.to_dict()) == numbers(whole.to_dict())
    third = Stopping(encoder, 0)
    assert evaluate(third, data, work=work).resumed["pairs"] == 72


def test_ctrl_c_says_where_the_work_is_kept_and_exits_130(tiny_bundle, root, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoder, "itm_scores", interrupted)
    work = tmp_path / "work"
    code = run(["eval", str(tiny_bundle), "--dataset", str(root), "--work", str(work), "--threads", "1"])
    assert code == 130
    assert f"kept in {work}; the same command resumes it" in capsys.readouterr().err.replace("\n", " ")


def test_another_rerank_takes_images_texts_and_equal_pairs_from_the_work_folder(encoder, data, tmp_path):
    work = open_work(tmp_path / "work", Binding.of(encoder, data, "cpu"))
    evaluate(encoder, data, rerank=64, work=work)
    found = evaluate(encoder, data, rerank=100, work=work)
    assert found.resumed == {"images": 6, "texts": 12, "pairs": 72}


def test_a_work_folder_of_something_else_is_refused_in_words(tiny_bundle, root, tmp_path, copy_of, capsys):
    bundle, work = copy_of(tiny_bundle), tmp_path / "work"
    arguments = ("eval", bundle, "--dataset", root, "--work", work, "--rerank", 1, "--threads", 1, "--json")
    own_json(capsys, *arguments)
    for others, words in (
        (("--limit", 3), "another data set, split or --limit, other boxes"),
        (("--boxes", "none"), "with other boxes;"),
        (("--alpha", 3), "with other perturbation settings;"),
    ):
        _, said = own_json(capsys, *arguments, *others, code=2)
        assert words in said
        assert "give --work another folder, or delete this one" in said
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    _, said = own_json(capsys, *arguments[:5], full, code=2)
    assert "holds other files" in said


def test_the_default_work_folder_is_gone_when_all_is_written_and_a_chosen_one_stays(
    tiny_bundle, root, copy_of, own_cache, tmp_path, capsys
):
    bundle, folders = copy_of(tiny_bundle), own_cache / "evaluations"
    before = set(folders.glob("*"))  # an interrupted evaluation of another test may be there
    own_json(capsys, "eval", bundle, "--dataset", root, "--rerank", 1, "--limit", 5, "--threads", 1, "--json")
    assert folders.is_dir()
    assert set(folders.glob("*")) == before
    own_json(capsys, "eval", bundle, "--dataset", root, "--rerank", 1, "--work", tmp_path / "kept", "--json")
    assert (tmp_path / "kept" / "scores.sqlite").is_file()


def test_a_disk_without_room_for_the_features_is_said_at_once(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6})())
    # an image: 17 tokens × 32 float32 features and 4 queries × 16 float32 numbers
    check_room(tmp_path, encoder, 10**6 // (17 * 32 * 4 + 4 * 16 * 4))
    with pytest.raises(UnavailableError, match=r"5,000 images take 0.0 GB.*larger disk"):
        check_room(tmp_path, encoder, 5000)


# Bad input


def changed(tmp_path, change):
    """A small set whose annotation was changed."""
    root = write_set(tmp_path / "set", images=3)
    entries = read_annotation(root)
    change(entries)
    write_annotation(root, entries)
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.append({"image": "flickr30k-images/gone.png", "caption": ["a"]}), "1 of 4 images are not under"),
        (lambda e: e.append(e[0]), "repeats the image"),
        (lambda e: e[1].update(caption=["a dog", "  "]), "at least one, none empty"),
        (lambda e: e[1].update(caption=["a \ud800 dog"]), "not valid Unicode"),
        (lambda e: e[1].update(caption=[]), "at least one"),
    ],
)
def test_a_bad_annotation_stops_the_command_before_it_encodes(
    tmp_path, tiny_bundle, monkeypatch, capsys, change, message
):
    monkeypatch.setattr(Encoder, "encode_images", None)
    _, said = own_json(capsys, "eval", tiny_bundle, "--dataset", changed(tmp_path, change), code=2)
    assert message in said


def test_captions_of_any_script_are_evaluated(tmp_path, encoder):
    odd = ["Café — ☃ 猫 😀", "İstanbul\u0301 \u200d", "ＦＵＬＬ ｗｉｄｔｈ", "a\tb\nc"]
    root = changed(tmp_path, lambda entries: entries[0].update(caption=odd))
    assert evaluate(encoder, open_data(root), rerank=2).metrics.texts == 8


def test_images_that_the_annotation_does_not_name_are_left_out(tmp_path, encoder):
    root = changed(tmp_path, lambda entries: entries.pop(0))
    assert evaluate(encoder, open_data(root), rerank=1).metrics.images == 2


def test_a_file_that_is_no_image_is_named(tmp_path, tiny_bundle, capsys):
    root = write_set(tmp_path / "set", images=2)
    (root / "flickr30k-images" / "0001.png").write_bytes(b"no picture")
    _, said = own_json(capsys, "eval", tiny_bundle, "--dataset", root, code=2)
    assert "0001.png is not an image that PIL can read" in said


def test_xml_without_size_and_boxes_on_the_border_or_outside_are_read(tmp_path):
    root = write_set(tmp_path, images=3)
    write_entities(root, "0000", 40, size="")  # as tall as the picture, which the XML does not tell
    write_entities(root, "0001", 50)  # ten rows below the picture: clipped, and said
    (root / "flickr30k_entities" / "Annotations" / "0002.xml").write_text(
        "<annotation><object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object></annotation>"
    )
    with pytest.warns(QpertWarning, match=r"0001.xml: object 2: box \(0, 0, 50, 50\) reached out of the image"):
        data = open_data(root)
    np.testing.assert_allclose(data.largest_areas, [40 * 40 / 2400, 50 * 40 / 2400, np.nan])
    assert data.boxes_from.endswith("2 boxes on 2 of 3 images")


def test_a_box_without_area_is_an_error_that_names_the_file(tmp_path, tiny_bundle, capsys):
    root = write_set(tmp_path / "set", images=2)
    write_entities(root, "0001", 0)
    _, said = own_json(capsys, "eval", tiny_bundle, "--dataset", root, code=2)
    assert "0001.xml: object 2" in said


def test_images_without_boxes_count_in_recall_and_in_no_bin(tmp_path, encoder):
    root = write_set(tmp_path, images=3)
    (root / "flickr30k_entities" / "Annotations" / "0001.xml").unlink()
    with pytest.warns(QpertWarning, match="1 of 3 images are not in"):
        found = evaluate(encoder, open_data(root), rerank=1)
    assert (found.metrics.unbinned, found.metrics.t2i.queries) == (1, 6)
    assert "1 images have no boxes: they count in R@K and in no size bin" in notes(found)


@pytest.mark.parametrize("stage", ["ITC", "ITM"])
def test_a_score_that_is_no_number_is_an_error_that_names_image_and_text(encoder, data, stage):
    class Broken:
        def encode_texts(self, texts):
            embeds = encoder.encode_texts(texts)
            return np.where(np.arange(len(embeds))[:, None] == (3 if stage == "ITC" else -1), np.nan, embeds)

        def itm_scores(self, features, texts):
            scores = encoder.itm_scores(features, texts)
            scores[0, 5] = np.nan
            return scores

    features = ImagesInMemory(encoder.encode_images(data.dataset.images, data.boxes))
    with pytest.raises(InputError, match=rf"{stage} scores are NaN, .* of image 0 with text \d+ .*fp32"):
        score_pairs(Broken(), features, encoder.tokenize(data.dataset.captions))


def test_options_that_cannot_be_are_refused(tiny_bundle, root, capsys):
    for options, words in (
        (("--split", "dev"), "expected one of train, val, test"),
        (("--dataset", root / "nowhere"), "does not exist"),
        (("--boxes", "nothing.csv"), "nothing.csv does not exist"),
        (("--limit", 0), "0 is not in the range"),
        (("--rerank", -1), "-1 is not in the range"),
    ):
        _, said = own_json(capsys, "eval", tiny_bundle, "--dataset", root, *options, code=2)
        assert words in said


# Demonstration, published figures, page


def test_demo_is_drawn_once_and_has_a_thousand_scenes_with_boxes(own_cache):
    data = open_data("demo", limit=3)
    folder = demo_folder("test", Silent())
    assert own_cache in folder.parents
    annotation = folder / "annotations" / "test.json"
    before = annotation.stat().st_mtime_ns
    again = open_data("demo")
    assert (len(again.dataset), len(again.dataset.captions)) == (1000, 5000)
    assert annotation.stat().st_mtime_ns == before
    assert again.dataset.names[:3] == data.dataset.names
    assert "1,000 of 1,000 images" in again.boxes_from
    assert published_for(again.dataset, "blip2") is None, "a thousand scenes are not Flickr30K"


def named_set(folder, first, caption, images, texts):
    """A data set of given size in memory, with one real name and caption in the middle."""
    names = [f"{folder}/{number}.jpg" for number in range(images)]
    names[images // 2] = f"{folder}/{first}"
    owners = np.sort(np.arange(texts) % images)
    captions = ["a dog"] * texts
    captions[int(np.flatnonzero(owners == images // 2)[1])] = caption
    return RetrievalDataset(Path("/data"), "test", tuple(names), tuple(captions), owners)


HAT = "The man with pierced ears is wearing glasses and an orange hat."
MOPED = "A man with a red helmet on a small moped on a dirt road. "


def test_flickr30k_and_coco_are_recognised_with_the_papers_figures():
    flickr_set = named_set("flickr30k-images", "1007129816.jpg", HAT, 1000, 5000)
    assert published_for(flickr_set, "siglip") is None, "BLIP-2's figures say nothing of another model"
    flickr = published_for(flickr_set, "blip2")
    assert [row.source for row in flickr.rows] == ["paper", "paper", "paper", "release"]
    assert [row.t2i["r1"] for row in flickr.rows] == [89.76, 89.82, 89.86, 89.88]
    assert flickr.rows[3].small["t2i"]["r1"] == 85.33
    assert "α 8, τ 0.99" in flickr.rows[3].setting
    coco = published_for(named_set("val2014", "COCO_val2014_000000391895.jpg", MOPED, 5000, 25010), "blip2")
    assert [row.i2t["r1"] for row in coco.rows] == [85.32, 85.52, 85.44]


@pytest.mark.parametrize(
    ("name", "caption", "images", "texts"),
    [
        ("1007129816.jpg", HAT, 999, 4995),  # a part
        ("1007129816.jpg", "A bearded man in a knitted orange hat.", 1000, 5000),  # other captions, as in Flickr-FG
        ("0000000007.jpg", HAT, 1000, 5000),
    ],
)
def test_parts_and_other_captions_are_not_compared_with_published_figures(name, caption, images, texts):
    assert published_for(named_set("flickr30k-images", name, caption, images, texts), "blip2") is None


def test_published_figures_stand_above_this_run_with_their_settings(whole):
    flickr = named_set("flickr30k-images", "1007129816.jpg", HAT, 1000, 5000)
    found = replace(whole, data=replace(whole.data, dataset=flickr))
    table = published_table(found)
    assert table.rows[0] == ("[1] paper", "89.76", "98.96", "88.75", "81.33", "97.60", "100.00", "97.23")
    assert table.rows[-1][:2] == ("this run", f"{whole.metrics.t2i.recall[1]:.2f}")
    assert any(line.startswith("[4] with perturbation, Entities boxes: constant weight") for line in table.legend)
    page = page_of(found)
    assert "published, and this run" in page
    assert "(README of the authors&#x27; code of the release)" in page
    assert published_table(whole) is None


def test_the_page_stands_alone_and_shows_text_as_text(whole):
    page = page_of(replace(whole, data=replace(whole.data, title="<script>alert(1)</script>")))
    assert "<script>" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "text → image: mR@1, mR@5, mR@10 undefined" in page
    assert "2 images with 4 texts" in page


@pytest.mark.parametrize(("orientation", "size"), [(6, (SIZE[1], SIZE[0])), (9, SIZE), (1, SIZE)])
def test_boxes_are_in_the_pixels_of_the_picture_as_it_is_seen(tmp_path, orientation, size):
    from PIL import Image

    root = write_set(tmp_path, images=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", SIZE).save(root / "flickr30k-images" / "0000.png", exif=exif)
    assert open_data(root, boxes="none", bin_boxes="none").boxes[0].size == size


def test_words_of_the_sets_differ_so_that_captions_do():
    assert len(set(WORDS)) == len(WORDS)
