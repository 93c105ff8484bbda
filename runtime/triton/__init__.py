"""A bundle as a model repository of NVIDIA's Triton Inference Server.

`plan` decides which models there are, `config` describes each to Triton, and `repository` writes them; `models` is what
Triton's python backend runs: tokenising, decoding and preprocessing, query sets, and, where asked for, the graphs
themselves. Triton's Python needs `pip install 'qpert[cpu]'` for those; no other part of the runtime imports this
package.
"""
