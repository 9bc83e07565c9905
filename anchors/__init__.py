"""label-anchors: look inside in-context learning.

    import anchors

    model, task = anchors.load(), anchors.task("sst2")
    data = anchors.read(task)
    found = anchors.measure(model, anchors.Isolation(), task, data, anchors.Sample(examples=50))
    found.tables()["summary"]      # with intervals; found.rows is the long table
    found.plot()                   # the picture of the paper's figure, of your model

    drawn = anchors.draw(task, data, model.tokenizer, anchors.Draw(seed=42), 1)
    anchors.page(model, task, [drawn[0].prompt])   # a page to click through, which a notebook shows

`print(model)` and `print(found)` say what they are and what to do with them. What can be measured: InformationFlow (Figure 3),
Isolation (Figure 4), Readout (Figure 5), Reweighting (Table 1), Compression (Table 2), Diagnosis (Figure 6), Causal (ours),
Classification; `help(anchors.Isolation)` says what each does and takes. `anchors.seam` edits attention yourself, and
`anchors.AnchorCache` goes on from label words alone.

`dir(anchors)` is what a first page needs; everything else is imported from the module it stands in. Names are imported on
first use (`__init__.pyi` says from where), so that the command line can show its help without loading torch.
"""

from pathlib import Path

import lazy_loader

from anchors._names import find_moved, forwarding, refuse_mixture

refuse_mixture(__name__, Path(__file__).parent)

find_moved()

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = forwarding(__name__, _lazy)
