"""The paper's baselines beside its perturbation: what `qpert eval --method` runs, and their comparison.

    from qpert.runtime.evaluation.methods.choices import Choices
    from qpert.runtime.evaluation.methods.compare import compare

    comparison = compare(encoder, data, ("none", "q-pert", "oes"), Choices(), work=None)
    comparison.evaluation("oes").metrics.t2i.recall[1]     # R@1 in percent

`choices`: the methods and what the paper leaves open. `images`: what a method makes of an image. `compare`: all methods
on one split, sharing image tokens, texts and matched pairs. `differences`: paired bootstrap. `report`: the page.
"""
