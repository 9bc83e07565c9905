"""What `generate` keeps of a layer of Native Sparse Attention between steps: keys, values, and those compressed from them.

    K^cmp = {φ(k_{id : id+l}) | 0 ≤ i ≤ ⌊(t − l)/d⌋}                                                  (Eq. 7)

A step of one token completes a block once in d steps; all other compressed keys are those of the step before. An
`NSALayer` keeps them, and makes only the blocks that the new tokens complete. It takes the place of transformers'
`DynamicLayer` in whatever cache an NSA model is given, so that beams, `crop` and batches work as with any model.

Where prompts are padded on the left, blocks are those of each text (`anchors.nsa.texts.Layout`), behind those of its
padding. Of the C = ⌊(T − l) / d⌋ + 1 rows no example leaves more than the last l / d unused: these are made anew.

The raw keys of all three branches stay, side by side as 3 · groups heads: `crop` goes back to any length, and edits and
saliency at the seam split compressed keys over their tokens.

The literal twin makes every compressed key anew, from any other layer that grows (a subclass of `DynamicLayer`, say).

Source: Yuan et al., "Native Sparse Attention" (ACL 2025), section 3.3.1.
"""

from collections.abc import Callable, Hashable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from anchors.nsa.geometry import Geometry
from anchors.nsa.texts import Texts

ROOM = 256
"""Rows at least that a buffer is given beyond those it needs: below them it grows without a copy."""
SHARE = 8
"""A long buffer gets room for an eighth of its rows, so that all copies of T steps together are O(T)."""

Pair = tuple[Float[Tensor, "batch blocks groups dim"], Float[Tensor, "batch blocks groups dim_v"]]


class NSALayer(DynamicLayer):
    """A layer of a cache that grows in place, and remembers the compressed keys and values of its complete blocks.

    What is remembered is trusted only while `keys` and `values` are the very tensors that this layer left there:
    whoever puts others in their place has all of it made anew.

    Attributes:
        keys, values: of the tokens held, [batch, heads, tokens, dim], views of larger buffers.
        kc, vc: of their first blocks, [batch, groups, blocks, dim]; None where none is remembered.
        positions: where the tokens stand, [batch or 1, tokens]; None for 0, 1, ….
        texts: where the texts lie that the layer was last given, in a batch that is padded; else None.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.positions: Tensor | None = None
        self.texts: Texts | None = None
        self._forget()

    def _forget(self) -> None:
        self.kc: Tensor | None = None
        self.vc: Tensor | None = None
        self._made: tuple[Geometry, Hashable] | None = None
        self._room: dict[str, Tensor] = {}
        self._sign()

    def _sign(self) -> None:
        # With its own number: a shallow copy of a layer must not write into the buffers of the first.
        self._signed = (id(self), self.keys, self.values)

    @property
    def trusted(self) -> bool:
        """Whether `keys` and `values` are what this layer left there."""
        owner, keys, values = self._signed
        return owner == id(self) and keys is self.keys and values is self.values

    def update(
        self,
        key_states: Float[Tensor, "batch heads new dim"],
        value_states: Float[Tensor, "batch heads new dim_v"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "batch heads tokens dim"], Float[Tensor, "batch heads tokens dim_v"]]:
        """Appends the keys and values of new tokens, and returns those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.trusted:
            self._forget()
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        self._sign()
        return self.keys, self.values

    def compressed(
        self, geometry: Geometry, maker: Hashable, make: Callable[[int], Pair], unused: int = 0
    ) -> Pair:
        """kc and vc of every complete block of the tokens held.

        Args:
            geometry: l and d of the blocks.
            maker: what tells φ and the rotary embedding apart; blocks of another maker are made anew.
            make: function from the number of the first block that is wanted to kc and vc from it on.
            unused: how many of the last rows may have held nothing yet, and are made anew.
        """
        wanted, asked = geometry.compressed(self.get_seq_length()), (geometry, maker)
        if not self.trusted or not wanted:
            return make(0)
        kc, vc = (self.kc, self.vc) if self._made == asked else (None, None)
        if kc is None or vc is None or unused or kc.shape[-2] < wanted:
            kept = 0 if kc is None or vc is None else max(0, kc.shape[-2] - unused)
            new_kc, new_vc = (x.transpose(1, 2) for x in make(kept))
            kc, vc = (
                self._appended(name, x if x is None else x[..., :kept, :], new)
                for name, x, new in (("kc", kc, new_kc), ("vc", vc, new_vc))
            )
            self.kc, self.vc, self._made = kc, vc, asked
        return kc.transpose(1, 2), vc.transpose(1, 2)

    def crop(self, *args: int) -> None:  # ty: ignore[incompatible-method-override] - called otherwise in other versions
        """Forgets the last tokens, in whatever way this transformers counts them, and the blocks that they were in."""
        trusted = self.trusted
        super().crop(*args)
        if not trusted:
            return
        tokens = self.get_seq_length()
        if self._made is not None and self.kc is not None and self.vc is not None:
            complete = self._made[0].compressed(tokens)
            self.kc, self.vc = self.kc[..., :complete, :], self.vc[..., :complete, :]
        self._sign()

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.positions = self.texts = None
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the examples in another order, some twice: beams."""
        self._over_examples(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each example so many times, one behind the other."""
        self._over_examples(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the examples only."""
        self._over_examples(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices])

    def _over_examples(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.get_seq_length() or self.keys is None:
            return
        if not self.trusted:
            self._forget()
        batch = len(self.keys)
        held = {"keys": self.keys, "values": self.values, "kc": self.kc, "vc": self.vc}
        for name, x in held.items():
            if x is None:
                continue
            if name in self._room:  # with its room, or the next token would copy it once more
                self._room[name] = change(self._room[name])
                setattr(self, name, self._room[name][..., : x.shape[-2], :])
            else:
                setattr(self, name, change(x))
        if self.positions is not None and len(self.positions) == batch > 1:
            self.positions = change(self.positions)
        if self.texts is not None and len(self.texts.start) == batch > 1:
            self.texts = self.texts.of_examples(change)
        self._sign()

    def _appended(self, name: str, held: Tensor | None, new: Tensor) -> Tensor:
        """`held` with `new` behind it: in the room of its buffer, or in a larger one."""
        if held is None or not held.numel():
            held = new[..., :0, :]
        alike = (held.shape[:-2], held.shape[-1], held.dtype, held.device) == (
            new.shape[:-2], new.shape[-1], new.dtype, new.device
        )  # fmt: skip
        if not alike or held.requires_grad or new.requires_grad:
            self._room.pop(name, None)
            return torch.cat([held, new], dim=-2)
        before, after = held.shape[-2], held.shape[-2] + new.shape[-2]
        room = self._room.get(name)
        # Outside of inference mode nothing can be written into a tensor that was made in it.
        closed = room is not None and room.is_inference() and not torch.is_inference_mode_enabled()
        if room is None or closed or room.shape[-2] < after:
            size = after + max(ROOM, after // SHARE)
            room = new.new_empty(*new.shape[:-2], size, new.shape[-1])
            room[..., :before, :] = held
            self._room[name] = room
        room[..., before:after, :] = new
        return room[..., :after, :]


def remembering(cache: Cache, layer: int) -> NSALayer | None:
    """The layer of a cache that remembers compressed keys: what is there, or in the place of transformers' own.

    Returns:
        None for a layer of another kind, which is left alone: its compressed keys are made anew.
    """
    while cache.layer_class_to_replicate is DynamicLayer and len(cache.layers) <= layer:
        cache.layers.append(NSALayer())
    if layer >= len(cache.layers):
        return None
    found = cache.layers[layer]
    if type(found) is DynamicLayer:
        cache.layers[layer] = own = NSALayer()
        vars(own).update(vars(found))
        return own
    return found if isinstance(found, NSALayer) else None
