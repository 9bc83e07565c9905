"""Cross-modal skill injection: put an expert LLM's skill into a vision-language model without training.

    from anchors.injection import Recipe, TaskVectors, inject, load_vlm
    from anchors.injection.merging.merge import merge

    report = merge("llava", "expert", "llm", Recipe("task-arithmetic", strength=0.5), "out")    # disk to disk, streaming

    vectors = TaskVectors.of(vlm, base, expert)                                                  # in memory, reversible
    with inject(vlm, vectors, "dare", 0.5, density=0.5) as injected:
        ...

Rooms: `merging` (from tensors to a merged model), `asking` (a VLM's answers), `sweeping`, `image_flow` and `demo`, each behind a
verb of `anchors inject`. Names are imported on first use.

Source: Xu et al., "Investigating Cross-Modal Skill Injection" (ACL 2026), and the methods' own papers (`METHODS`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
