"""The quickstart: from an empty folder to a trained, measured multimodal LLM, in the order of its
files: assets -> weights -> datasets -> (mmfusion fit, twice) -> measure -> report.
"""
