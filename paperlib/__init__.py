"""Code behind the notebooks that reproduce "Towards Deeper Understanding of Variational Autoencoding Models".

Zhao, Song, Ermon, arXiv 1702.08658. One module stands behind each notebook (`elbo`, `fuzziness`, ...); what they
share lies below them. Modules import only from lower layers, see docs/library.md.
"""
