"""The Linux kernel as tunledger sees it: observe links, execute steps, translate errno. And a fake one for planning.

Decisions do not live here: what to do comes in as typed steps (`service.domain.steps`).
"""
