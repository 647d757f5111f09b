"""The library behind the notebooks that reproduce "Towards Deeper Understanding of Variational Autoencoding Models".

Zhao, Song, Ermon, arXiv 1702.08658. Each notebook has a chapter, and every chapter has the same rooms; docs/library.md
draws the tree.
"""
