"""Which pairs are matched, and the order that comes of their scores: by hand, by brute force, by torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate

from qpert.runtime.evaluation.metrics import CUTS, image_to_text_ranks, text_to_image_ranks
from qpert.runtime.evaluation.pair_scores import PairScores
from qpert.runtime.evaluation.schedule import Schedule

# Two images, three texts; texts 0 and 1 belong to image 0.
ITC = np.array([[0.9, 0.1, 0.8], [0.2, 0.5, 0.7]], np.float32)
OWNERS = np.array([0, 0, 1])


def scored(itc, itm, rerank):
    """Pair scores whose ITM is read from a full matrix."""
    schedule = Schedule.plan(itc, rerank)
    images, texts = np.divmod(schedule.keys, itc.shape[1])
    return PairScores(itc, schedule, itm[images, texts])


def random_scores(seed=0, images=12, texts=40):
    random = np.random.default_rng(seed)
    owners = np.sort(np.concatenate([np.arange(images), random.integers(0, images, texts - images)]))
    itc = random.standard_normal((images, texts)).astype(np.float32)
    return itc, random.standard_normal((images, texts)).astype(np.float32) * 3, owners


def lavis_matrix(itc, itm, k):
    """[queries, candidates] as LAVIS's compute_sim_matrix fills one: −100, and ITM + ITC for each row's top k."""
    matrix = np.full(itc.shape, -100.0, np.float32)
    for row in range(len(itc)):
        top = np.argsort(-itc[row], kind="stable")[:k]
        matrix[row, top] = itm[row, top] + itc[row, top]
    return matrix


def test_shortlists_and_their_union_of_a_case_worked_by_hand():
    schedule = Schedule.plan(ITC, 1)
    assert schedule.by_text.tolist() == [[0], [1], [0]]  # the better image of each column
    assert schedule.by_image.tolist() == [[0], [2]]  # the best text of each row
    # pairs (image, text): (0,0) on both lists, (0,2), (1,1), (1,2)
    assert schedule.keys.tolist() == [0, 2, 4, 5]
    assert [schedule.texts_of(image).tolist() for image in (0, 1)] == [[0, 2], [1, 2]]


def test_every_pair_of_either_shortlist_comes_once_with_its_image():
    itc, _, _ = random_scores()
    schedule = Schedule.plan(itc, 3)
    wanted = set()
    for text in range(40):
        wanted |= {(int(image), text) for image in np.argsort(-itc[:, text])[:3]}
    for image in range(12):
        wanted |= {(image, int(text)) for text in np.argsort(-itc[image])[:3]}
    found = [(image, text) for image in range(12) for text in schedule.texts_of(image).tolist()]
    assert sorted(found) == found
    assert set(found) == wanted
    assert len(found) == len(wanted) == len(schedule)


@pytest.mark.parametrize("rerank", [40, 64, 10**9])
def test_a_shortlist_as_long_as_the_candidates_matches_every_pair(rerank):
    itc, _, _ = random_scores()
    schedule = Schedule.plan(itc, rerank)
    assert len(schedule) == itc.size
    assert (schedule.by_text.shape, schedule.by_image.shape) == ((40, 12), (12, 40))


def test_without_reranking_no_pair_is_matched_and_the_order_is_that_of_itc():
    itc, itm, _ = random_scores()
    scores = scored(itc, itm, 0)
    assert len(scores.schedule) == 0
    np.testing.assert_array_equal(scores.images_for(7), np.argsort(-itc[:, 7], kind="stable"))
    np.testing.assert_array_equal(scores.itc_alone().texts_for(3), np.argsort(-itc[3], kind="stable"))


def test_of_equal_scores_the_lower_index_comes_first_on_the_shortlist_and_below_it():
    level = np.zeros((4, 3), np.float32)
    scores = scored(level, level, 2)
    assert scores.schedule.by_text[0].tolist() == [0, 1]
    assert scores.images_for(0).tolist() == [0, 1, 2, 3]
    itm = np.array([[1, 1, 1], [2, 2, 2], [9, 9, 9], [9, 9, 9]], np.float32)
    # image 2 and 3 would match better, but ITC, level, leaves them off the shortlist
    assert scored(level, itm, 2).images_for(0).tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize("rerank", [1, 5, 12, 64])
def test_the_best_places_are_those_of_lavis_matrices_and_the_rest_follows_by_itc(rerank):
    itc, itm, owners = random_scores(seed=rerank)
    scores = scored(itc, itm, rerank)
    i2t, t2i = lavis_matrix(itc, itm, rerank), lavis_matrix(itc.T, itm.T, rerank)
    for image in range(12):
        order = scores.texts_for(image)
        np.testing.assert_array_equal(order[:rerank], np.argsort(-i2t[image], kind="stable")[:rerank])
        np.testing.assert_array_equal(order[rerank:], np.argsort(-itc[image], kind="stable")[rerank:])
        np.testing.assert_array_equal(scores.i2t_scores[image], i2t[image, scores.schedule.by_image[image]])
    for text in range(40):
        order = scores.images_for(text)
        np.testing.assert_array_equal(order[:rerank], np.argsort(-t2i[text], kind="stable")[:rerank])
        np.testing.assert_array_equal(order[rerank:], np.argsort(-itc[:, text], kind="stable")[rerank:])
    if rerank >= 40:  # then the dense matrices say it all
        np.testing.assert_array_equal(scores.t2i_ranks(owners), text_to_image_ranks(t2i.T, owners))
        np.testing.assert_array_equal(scores.i2t_ranks(owners), image_to_text_ranks(i2t, owners))


def test_recall_is_torchmetrics_hit_rate():
    itc, itm, owners = random_scores(images=30, texts=150)
    metrics = scored(itc, itm, 1000).metrics(owners, np.full(30, np.nan))
    final = torch.from_numpy(itm + itc)
    relevant = torch.from_numpy(owners[None] == np.arange(30)[:, None])
    for scores, target, way in ((final.T, relevant.T, metrics.t2i), (final, relevant, metrics.i2t)):
        query = torch.arange(len(scores))[:, None].expand_as(scores)
        for cut in CUTS:
            hits = RetrievalHitRate(top_k=cut)(scores.reshape(-1), target.reshape(-1), indexes=query.reshape(-1))
            # torchmetrics averages in float32
            assert way.recall[cut] == pytest.approx(100 * hits.item(), abs=1e-4)
    assert 0 < metrics.t2i.recall[1] < metrics.t2i.recall[10] < 100, "all or nothing would show nothing"


def test_an_image_without_text_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="image 1 has no text"):
        scored(ITC, ITC, 2).i2t_ranks(np.array([0, 0, 0]))
