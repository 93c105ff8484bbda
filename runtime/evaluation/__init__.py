"""Recall on a data set: which pairs to match, scores that survive a crash, metrics by object size, the report.

    from qpert.runtime.evaluation.evaluate import evaluate
    from qpert.runtime.evaluation.inputs import open_data

    evaluation = evaluate(encoder, open_data("flickr30k"), work=None)
    evaluation.metrics.t2i.recall[1]     # R@1 in percent
    evaluation.scores.images_for(17)     # all images in the order in which caption 17 finds them

`running.score_pairs` is the schedule alone, over any network that encodes texts and matches pairs.
"""
