"""`anchors nsa probe`: every number against a slow loop, planted anchors found, none found where there are none."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from nsa_probing import SMALL, WORDS, calls, folder, found, full, lm, places, prompt, same  # noqa: F401 - fixtures
from sklearn.metrics import roc_auc_score

from anchors.attention.seam import seam
from anchors.errors import AnchorsError
from anchors.flow import flow
from anchors.flow.metrics import map_sums
from anchors.flow.saliency import collate, target_loss
from anchors.nsa import reference
from anchors.nsa.attention import BRANCHES, SLC
from anchors.nsa.call import Intervention
from anchors.nsa.geometry import Geometry
from anchors.nsa.model import NSAForCausalLM
from anchors.nsa.probing import metrics
from anchors.nsa.probing.interventions import answers, block_changes, conditions, outcome, targets
from anchors.nsa.probing.probe import geometry_of, probe_prompt, with_geometry

# ---- blocks: what may be chosen, by hand ----


def test_candidates_are_what_selection_does_not_force():
    for t in (0, 15, 16, 47, 80, 169):
        nothing = torch.zeros(1, 1, 1, SMALL.blocks(170))
        pushed = nothing.clone()
        forced = {0, t // 16, max(t // 16 - 1, 0)}
        candidate = metrics.candidates(t, 170, SMALL)
        assert set(np.flatnonzero(candidate)) == set(range(t // 16 + 1)) - forced
        for j in np.flatnonzero(candidate):
            pushed[..., j] = 1
        chosen = reference.select(pushed, geometry=SMALL, tokens=170, past=t)[0, 0, 0].tolist()
        assert forced <= set(chosen)
        assert metrics.free(t, SMALL) == SMALL.n - len(forced)


def test_chance_is_the_rate_of_random_choices():
    t, tokens, rng = 169, 170, torch.Generator().manual_seed(0)
    importance = torch.rand(1, 4000, 1, SMALL.blocks(tokens), generator=rng)
    idx = reference.select(
        importance.transpose(0, 1), geometry=SMALL, tokens=tokens, past=t
    )  # a batch of independent last positions
    chosen = metrics.members(idx[:, 0, 0].numpy(), SMALL.blocks(tokens))
    weight = metrics.weights(np.array([20, 25, 70, 100, 169]), 16, SMALL.blocks(tokens))
    rate = metrics.selection_rate(chosen, weight, metrics.candidates(t, tokens, SMALL))
    assert metrics.chance(t, SMALL) == 1 / 8
    assert rate.mean() == pytest.approx(1 / 8, abs=4 * rate.std() / 4000**0.5)
    assert np.isnan(metrics.chance(20, SMALL))


def test_block_statistics_are_plain_loops():
    rng = np.random.default_rng(1)
    for _ in range(20):
        blocks = 12
        weight, candidate = rng.integers(0, 3, blocks), rng.random(blocks) < 0.8
        chosen, score = rng.random((2, blocks)) < 0.4, rng.integers(0, 4, (2, blocks)) / 4
        anchors = [j for j in range(blocks) if candidate[j] and weight[j]]
        empty = [j for j in range(blocks) if candidate[j] and not weight[j]]
        total = sum(weight[j] for j in anchors)
        rate = metrics.selection_rate(chosen, weight, candidate)
        control = metrics.selection_rate(chosen, metrics.control_weights(weight, candidate), candidate)
        ranks, auc = (
            metrics.anchor_rank(score, weight, candidate),
            metrics.anchor_auc(score, weight, candidate),
        )
        for g in range(2):
            same(rate[g], sum(weight[j] for j in anchors if chosen[g, j]) / total)
            near = 0.0
            for j in anchors:
                least = min(abs(j - e) for e in empty)
                nearest = [e for e in empty if abs(j - e) == least]
                near += weight[j] * np.mean([chosen[g, e] for e in nearest])
            same(control[g], near / total)
            both = anchors + empty
            same(auc[g], roc_auc_score([j in anchors for j in both], score[g, both]))
            place = 0.0
            for j in anchors:
                above = sum(score[g, k] > score[g, j] for k in both)
                level = sum(score[g, k] == score[g, j] for k in both)
                place += weight[j] * (above + (level - 1) / 2) / (len(both) - 1)
            same(ranks[g], place / total)


def test_controls_without_room_are_missing():
    everywhere, candidate = np.ones(6), np.ones(6, bool)
    assert not metrics.control_weights(everywhere, candidate).any()
    assert metrics.matched(np.array([1, 2]), np.array([4])) is None
    assert metrics.matched(np.array([3, 6]), np.array([0, 4, 5, 9])).tolist() == [4, 5]


def test_permutations_stay_near_and_keep_the_weights():
    rng = np.random.default_rng(0)
    weight, candidate = np.arange(20), np.arange(20) > 3
    moved = metrics.permuted(weight, candidate, 50, rng, near=4)
    assert (moved[:, :4] == 0).all()
    for part in np.array_split(np.arange(4, 20), 4):
        assert (np.sort(moved[:, part]) == weight[part]).all()
    assert len(np.unique(moved, axis=0)) > 40


def test_jaccard_and_recall_by_sets():
    rng = np.random.default_rng(2)
    one, other = rng.random((2, 30, 7)) < 0.4
    weight = rng.integers(0, 3, 7)
    for i in range(30):
        a, b = set(np.flatnonzero(one[i])), set(np.flatnonzero(other[i]))
        same(metrics.jaccard(one, other)[i], len(a & b) / len(a | b) if a | b else 1)
        if total := sum(weight[j] for j in b):
            same(metrics.recall(one, other, weight)[i], sum(weight[j] for j in a & b) / total)


# ---- one prompt: every measure against the call, pair by pair ----


def test_flow_splits_by_branch_as_the_whole_maps_do(lm, prompt, found, places):
    maps: dict[tuple[str, int], torch.Tensor] = {}

    class Whole:
        layers = frozenset(range(2))

        def begin(self, call, z, dz):
            for name in (*BRANCHES, "all"):
                maps[name, call.layer] = torch.zeros(len(prompt.ids), len(prompt.ids), dtype=torch.float64)

        def branches(self, call, rows, by_branch):
            for name, product in by_branch.items():
                maps[name, call.layer][rows] = product[0].sum(0).abs()

        def tile(self, call, rows, keys, product):
            maps["all", call.layer][rows] = product[0].sum(0).abs()

    batch = collate([prompt])
    with torch.enable_grad(), seam(lm.modules, taps=[Whole()]):
        target_loss(lm.logits_at(batch.ids, batch.target), batch)[0].sum().backward()
    whole = flow(lm, [prompt]).sums
    for (name, layer), matrix in maps.items():
        sums = map_sums(matrix[None], list(prompt.label_positions), prompt.target)
        for pair in ("wp", "pq", "ww"):
            same(found[f"s_{pair}", name, layer, None, None, None], float(getattr(sums, f"s_{pair}")))
            if name == "all":
                same(
                    found[f"s_{pair}", name, layer, None, None, None],
                    float(getattr(whole, f"s_{pair}")[0, layer]),
                )


def test_coverage_counts_the_pairs_a_branch_attends(calls, prompt, found):
    q, labels = prompt.target, set(prompt.label_positions)
    for call in calls:
        idx, layer = call.idx[0], call.layer
        counts = {(b, p): 0 for b in BRANCHES for p in ("wp", "pq", "ww")}
        pairs = dict.fromkeys(("wp", "pq", "ww"), 0)
        for i in range(q + 1):
            read = {int(j) for group in idx[i] for j in group}
            last = (i - SMALL.l + 1) // SMALL.d if i >= SMALL.l - 1 else -1
            for j in range(i):
                pair = "pq" if i == q and j in labels else "wp" if i in labels else "ww"
                pairs[pair] += 1
                counts["win", pair] += j > i - SMALL.w
                counts["slc", pair] += j // SMALL.lp in read
                counts["cmp", pair] += last >= 0 and j < last * SMALL.d + SMALL.l
        for (branch, pair), count in counts.items():
            same(found[f"coverage_{pair}", branch, layer, None, None, None], count / pairs[pair])
            dense = found[f"s_{pair}", branch, layer, None, None, None]
            if count:
                same(found[f"support_{pair}", branch, layer, None, None, None], dense * pairs[pair] / count)


def test_chosen_blocks_masses_and_purity_are_plain_loops(calls, prompt, found, places):
    q, tokens = prompt.target, len(prompt.ids)
    for call in calls:
        layer, trace = call.layer, call.trace
        for group in range(2):
            read = [int(j) for j in trace.idx[0, q, group] if j >= 0]
            free = {j for j in read if 1 <= j <= q // 16 - 2}
            assert {k[5] for k in found if k[0] == "chosen" and k[2:4] == (layer, group)} == free
            row = trace.patterns[SLC][0, :, 2 * group : 2 * group + 2].sum(1)
            same(
                found["pq_mass", "slc", layer, group, None, None],
                float(sum(row[q, p] for p in places.labels)) / 2,
            )
            own = [float(row[p, text].sum()) / 2 for p, text in zip(places.labels, places.texts, strict=True)]
            same(found["wp_mass", "slc", layer, group, None, None], np.mean(own))
            whole = call.pattern()[0, 2 * group : 2 * group + 2].sum(0)
            same(
                found["pq_mass", "all", layer, group, None, None],
                float(sum(whole[q, p] for p in places.labels) / whole[q].sum()),
            )
            here = [p for p in places.labels if p // 16 in free]
            shares = [row[q, p] / row[q, p // 16 * 16 : min(p // 16 * 16 + 16, tokens)].sum() for p in here]
            if here:
                same(found["purity", "label", layer, group, None, None], float(np.mean(shares)))
                same(found["purity_even", "label", layer, group, None, None], 1 / 16)
            else:
                assert ("purity", "label", layer, group, None, None) not in found


def test_recall_and_churn_are_sets(calls, prompt, found, places):
    q, tokens = prompt.target, len(prompt.ids)
    for call in calls:
        s, layer = call.sparse, call.layer
        for group in range(2):
            mass = np.zeros(SMALL.blocks(tokens))
            for head in (2 * group, 2 * group + 1):
                scores = s.kv.k_slc[0, : q + 1, group] @ call.q[0, head, q] * call.scale
                for j, p in enumerate(scores.softmax(0).tolist()):
                    mass[j // 16] += p
            forced = {0, q // 16, q // 16 - 1}
            ranked = sorted(set(range(q // 16 + 1)) - forced, key=lambda j: (-mass[j], j))
            ideal = forced | set(ranked[: SMALL.n - len(forced)])
            own = {int(j) for j in call.idx[0, q, group]}
            same(found["recall", "none", layer, group, None, None], len(own & ideal) / 4)
            same(
                found["mass_recall", "none", layer, group, None, None],
                sum(mass[j] for j in own) / sum(mass[j] for j in ideal),
            )
            sets = [{int(j) for j in row if j >= 0} for row in call.idx[0, :, group]]
            at = {"label": [], "other": []}
            for t in range(SMALL.n * SMALL.lp, q):
                both = len(sets[t] & sets[t + 1]) / len(sets[t] | sets[t + 1])
                at["label" if t in places.labels else "other"].append(both)
            for where, values in at.items():
                same(found[f"jaccard_{where}", "none", layer, group, None, None], np.mean(values))


def test_dilution_is_a_tokens_share_of_its_compressed_values(calls, prompt, found, places):
    for call in calls:
        s, tokens = call.sparse, len(prompt.ids)
        kept = [[[] for _ in range(tokens)] for _ in range(2)]
        for c in range(SMALL.compressed(tokens)):
            block = s.v_cmp[0, 4 * c : 4 * c + 8].transpose(0, 1)
            size = s.phi_v.split(block)[0].norm(dim=-1)
            for group in range(2):
                for m in range(8):
                    kept[group][4 * c + m].append(float(8 * size[group, m] / size[group].sum()))
        for group in range(2):
            own = [np.mean(kept[group][p]) for p in places.labels if kept[group][p]]
            same(found["dilution_label", "none", call.layer, group, None, None], np.mean(own))


def test_gates_and_their_saliency_are_derivatives(lm, prompt, found, places, calls):
    factors = [
        torch.ones(1, len(prompt.ids), 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)
    ]
    edits = [
        Intervention(frozenset([layer]), gates=lambda _, f=f: f, name="f", neutral=True)
        for layer, f in enumerate(factors)
    ]
    batch = collate([prompt])
    with torch.enable_grad(), seam(lm.modules, edits=edits):
        loss = target_loss(lm.logits_at(batch.ids, batch.target), batch)[0].sum()
        slopes = torch.autograd.grad(loss, factors)
    for layer, slope in enumerate(slopes):
        gates = calls[layer].sparse.gates[0]
        for where, positions in places.by_name.items():
            for head in range(4):
                for c, branch in enumerate(BRANCHES):
                    key = (branch, layer, None, head, None)
                    same(
                        found[f"gate_saliency_{where}", *key],
                        float(slope[0, positions, head, c].abs().mean()),
                    )
                    same(found[f"gate_{where}", *key], float(gates[positions, head, c].mean()))
            share = gates[positions] / gates[positions].sum(-1, keepdim=True)
            evenness = -(share * share.log()).sum(-1).mean() / math.log(3)
            same(found[f"gate_entropy_{where}", "none", layer, None, None, None], float(evenness))


def test_the_same_weights_read_other_blocks(lm, prompt):
    other = with_geometry(lm, lp=32, n=3, w=8)
    assert geometry_of(other) == Geometry(l=8, d=4, lp=32, n=3, w=8)
    assert geometry_of(lm) == SMALL
    assert other.fingerprint != lm.fingerprint
    own = NSAForCausalLM(other.model.config).double().eval()
    own.load_state_dict(lm.model.state_dict())
    ids = torch.tensor([prompt.ids])
    with torch.no_grad():
        torch.testing.assert_close(other.model(ids).logits, own(ids).logits, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(other.model(ids).logits, lm.model(ids).logits)
    assert with_geometry(lm, n=None) is lm
    with pytest.raises(AnchorsError, match="l' = 30"):
        with_geometry(lm, lp=30)


def test_full_attention_has_flow_and_masses_only(full, prompt, places):
    rows, look, _ = probe_prompt(full, prompt, None, np.random.default_rng(0))
    whole = flow(full, [prompt]).sums
    for m in rows:
        if m.metric.startswith("s_"):
            assert m.condition == "all"
            same(m.value, float(getattr(whole, m.metric)[0, m.layer]))
    assert not look.idx
    assert not look.vectors
    assert {m.condition for m in rows if m.metric == "accuracy"} == {
        "none", "isolate-label", "isolate-answer", "isolate-control"
    }  # fmt: skip
    assert {m.metric for m in rows if m.metric.endswith("_mass")} == {"wp_mass", "pq_mass"}


# ---- interventions ----


@pytest.mark.parametrize("which", ["label", "answer"])
def test_targets_are_candidates_and_their_controls_equally_many(which, prompt, places):
    found = targets(places, len(prompt.ids), SMALL)
    positions = places.labels if which == "label" else places.answers
    anchors, others = found[which]
    free = set(range(1, prompt.target // 16 - 1))
    assert set(anchors) == {p // 16 for p in positions} & free
    if others is not None:
        assert len(others) == len(anchors)
        assert not set(others) & {p // 16 for p in positions}
        assert set(others) <= free


def test_bans_and_forces_change_what_q_reads(lm, prompt, places, calls):
    q, tokens = prompt.target, len(prompt.ids)
    blocks = targets(places, tokens, SMALL)["answer"][0]
    changes = block_changes(places, tokens, SMALL)
    for call in calls:
        ban, _ = changes["ban-answer"]
        _, force = changes["force-answer"]
        without = call._trace(slice(0, tokens), ban=ban(call)).idx[0]
        within = call._trace(slice(0, tokens), force=force(call)).idx[0]
        assert torch.equal(without[:q], call.idx[0, :q])
        assert torch.equal(within[:q], call.idx[0, :q])
        for group in range(2):
            assert not set(without[q, group].tolist()) & set(blocks)
            free = [j for j in within[q, group].tolist() if 1 <= j <= q // 16 - 2]
            assert set(free) <= set(blocks)
            assert free


def test_answers_on_a_cache_are_those_of_whole_runs(lm, prompt, places):
    every = {"none": []} | conditions(frozenset(range(2)), places, len(prompt.ids), SMALL)
    ids, at = torch.tensor([prompt.ids]), torch.tensor([prompt.target])
    moved = 0
    with torch.no_grad():
        untouched = lm.logits_at(ids, at)[0]
    for name, logits in answers(lm, prompt, every):
        with torch.no_grad(), seam(lm.modules, edits=every[name]):
            whole = lm.logits_at(ids, at)[0]
        assert torch.allclose(logits, whole, rtol=0, atol=1e-9), name
        moved += not torch.allclose(logits, untouched, rtol=0, atol=1e-6)
    assert len(every) >= 16
    assert moved >= 12


def test_cutting_a_branch_is_its_gate_at_zero(lm, prompt, places, calls):
    [edit] = conditions(frozenset([0]), places, len(prompt.ids), SMALL)["cut-win-label"]
    changed, call = calls[0].edited([edit])[0], calls[0]
    gates = call.trace.gates.clone()
    gates[0, places.labels, :, 2] = 0
    expected = sum(gates[..., c, None] * o for c, o in enumerate(call.trace.branch_o))[0]
    assert torch.allclose(changed, expected.transpose(0, 1), atol=1e-12)
    other = np.setdiff1d(np.arange(len(prompt.ids)), places.labels)
    assert torch.allclose(changed[:, other], call.fused()[0][:, other], atol=1e-12)


def test_outcome_by_hand(prompt):
    logits = torch.zeros(len(WORDS))
    logits[list(prompt.label_ids)] = torch.arange(len(prompt.label_ids)).float()
    top = len(prompt.label_ids) - 1
    right = outcome(logits, replace(prompt, gold=top))
    assert (right["accuracy"], right["margin"]) == (1, 1)
    wrong = outcome(logits, replace(prompt, gold=0))
    assert (wrong["accuracy"], wrong["margin"]) == (0, -top)
    same(wrong["logit"], -top / 2)
    same(wrong["probability"], 1 / sum(np.exp(range(top + 1))))
