# SPDX-License-Identifier: Apache-2.0
"""What the retrieval benchmark counts: by hand on small tensors, and on a real model whose attention is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.registry import policy_named
from kvstore.retrieval.segmenters.pages import Pages
from tests.layer_tokens import layer_tokens, rotate

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import bench_retrieval
    from recall.answering import Past
    from recall.capture import SINK_TOKENS, WINDOW_TOKENS, Layer, layer_of, received_attention
    from recall.choosers import ByPolicy, Chance, Chooser, Oracle, Recent, prepared
    from recall.costs import costs, index_share
    from recall.metrics import FULL_LAYERS, covered, mass_recall, needle_coverage, recovered
    from recall.plot import drawing
    from recall.prompts import natural_texts, notes_in, passkey

NUM_QUERIES = 3
MIDDLE = 128


def captured(seed: int) -> Layer:
    num_tokens = SINK_TOKENS + MIDDLE + WINDOW_TOKENS + NUM_QUERIES
    tokens = layer_tokens(num_tokens, seed=seed)
    query = torch.randn(2, 3, num_tokens, 16, generator=torch.Generator().manual_seed(seed + 100))
    return layer_of(query, tokens.keys, tokens.values, tokens.positions, rotate, NUM_QUERIES)


LAYERS = [captured(seed) for seed in range(FULL_LAYERS + 2)]


def letters(text: str) -> list[int]:
    """A tokenizer."""
    return [ord(letter) for letter in text]


def test_recovered_attention_is_that_of_chosen_tokens_of_all_heads_of_a_group() -> None:
    attention = torch.tensor([[[0.1, 0.2, 0.3], [0.0, 0.5, 0.1]], [[0.4, 0.0, 0.0], [0.2, 0.2, 0.2]]])
    chosen = (torch.tensor([16, 18]), torch.tensor([17]))
    assert recovered(attention, chosen, first=16) == pytest.approx(0.1 + 0.3 + 0.0 + 0.1 + 0.0 + 0.2)


def test_coverage_is_the_mean_over_heads_of_the_share_of_the_note() -> None:
    assert covered((torch.tensor([4, 5, 6, 9]), torch.tensor([7])), slice(5, 9)) == pytest.approx((2 / 4 + 1 / 4) / 2)


def test_captured_attention_is_the_softmax_over_all_that_a_query_sees() -> None:
    layer = LAYERS[0]
    token = 1
    seen = layer.num_past + token + 1
    query = rotate(layer.query.query[1, 2, token][None, None, None], layer.query.positions[:, None, token : token + 1])
    keys = rotate(layer.run.keys[1:2][None], layer.run.positions[:, None])[0, 0, :seen]
    weights = torch.softmax(keys @ query[0, 0, 0] / 4, dim=0)
    torch.testing.assert_close(layer.attention[1, 2, token], weights[SINK_TOKENS : SINK_TOKENS + MIDDLE])
    assert layer.middle.first == SINK_TOKENS
    assert layer.middle.num_tokens == MIDDLE


def test_received_attention_comes_from_later_tokens_of_the_window_only() -> None:
    query, keys = torch.zeros(1, 2, 40, 4), torch.zeros(1, 40, 4)
    received = received_attention(query, keys)
    # With equal logits, the query at 8k spreads 1 over 8k + 1 tokens, in both heads.
    expected = [2 * sum(1 / (asks + 1) for asks in range(0, 40, 8) if asks > token) for token in range(40)]
    torch.testing.assert_close(received[0], torch.tensor(expected))


def test_no_chooser_surpasses_the_oracle_and_a_budget_for_everything_recovers_everything() -> None:
    by_policy = [ByPolicy(policy_named(name)) for name in ("quest", "auto")]
    every: list[Chooser] = [*by_policy, Recent(), Chance()]
    for chooser in every:
        found = mass_recall(prepared(chooser, LAYERS), LAYERS, (32, MIDDLE))
        assert found[MIDDLE] == pytest.approx(1, abs=1e-5)
        page = chooser.segmenter if isinstance(chooser, ByPolicy) else Pages(1)
        assert found[32] <= mass_recall(prepared(Oracle(page), LAYERS), LAYERS, (32,))[32] + 1e-3


def test_the_oracle_of_single_tokens_recovers_the_best_of_them() -> None:
    found = mass_recall(prepared(Oracle(Pages(1)), LAYERS), LAYERS, (8,))[8]
    best = sum(
        float(layer.attention[head, :, token].sum(0).topk(8).values.sum())
        for layer in LAYERS[FULL_LAYERS:]
        for head in range(2)
        for token in range(NUM_QUERIES)
    )
    assert found == pytest.approx(best / sum(float(layer.attention.sum()) for layer in LAYERS[FULL_LAYERS:]), rel=2e-3)


def test_notes_are_covered_by_recent_tokens_if_they_are_recent() -> None:
    end = SINK_TOKENS + MIDDLE
    asks = [(slice(0, NUM_QUERIES), slice(end - 8, end)), (slice(0, 1), slice(end - 40, end - 24))]
    assert needle_coverage(prepared(Recent(), LAYERS), LAYERS, asks, 8) == pytest.approx(3 / 4)
    assert needle_coverage(prepared(Recent(), LAYERS), LAYERS, asks, 32) == pytest.approx((3 + 0.5) / 4)


@pytest.mark.parametrize("position", list(PositionPolicy))
def test_reading_all_there_is_in_one_run_is_full_attention(position: PositionPolicy) -> None:
    if position is PositionPolicy.CONSTANT_FAR:
        return  # stands elsewhere by design; the next test has it
    tokens, query = layer_tokens(40), torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(3))
    past = Past(tokens.keys, tokens.values, rotate)
    full = past.attend_to_all(query, 38)
    far, near = (torch.arange(20),) * 2, torch.arange(20, 40)
    torch.testing.assert_close(past.attend(query[:, 1], far, near, position), full[:, 1])
    seen = [(far, near[:-1]), (far, near)]
    torch.testing.assert_close(past.attend_in_place(query, seen, 38), full)


def test_constant_far_keys_are_met_by_queries_a_window_away() -> None:
    tokens, query = layer_tokens(40), torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    far, near = torch.tensor([0, 1, 7]), torch.arange(30, 40)
    found = Past(tokens.keys, tokens.values, rotate).attend(query, (far, far), near, PositionPolicy.CONSTANT_FAR)
    here, afar = (rotate(query[None, :, None], torch.tensor([[[at]]]))[0, :, 0] for at in (39, WINDOW_TOKENS))
    for head in range(6):
        group = head // 3
        logits = [float(afar[head] @ tokens.keys[group, token]) for token in far]
        logits += [float(here[head] @ tokens.rotated[group, token]) for token in near]
        weights = (torch.tensor(logits) / 4).softmax(0)
        torch.testing.assert_close(found[head], weights @ tokens.values[group, torch.cat([far, near])])


def test_costs_count_what_is_read_and_what_is_new() -> None:
    policy = policy_named("quest")
    found = costs(prepared(ByPolicy(policy), LAYERS), LAYERS, budget=MIDDLE)
    assert found.read_nbytes == 2 * 2 * MIDDLE * (16 + 16) * 2  # layers, heads, tokens, elements, bytes
    assert found.moved_nbytes == 0
    assert index_share(policy, LAYERS[0]) == pytest.approx(2 * 16 / 16 / 32)


def test_prompts_say_where_notes_are_and_what_is_asked() -> None:
    text = natural_texts(letters, 1500, 4, None)["reference"].ids
    for prompt in (passkey(letters, 1500, 0.99, 1), notes_in(letters, text, 1500, 3)):
        num_past = len(prompt.ids) - prompt.num_queries
        behind = [*prompt.ids[num_past:], prompt.next_id]
        for ask in prompt.asks:
            assert ask.note.start >= SINK_TOKENS
            assert ask.note.stop <= num_past - WINDOW_TOKENS
            answer = behind[ask.answer]
            assert answer
            assert set(answer) <= set(prompt.ids[ask.note])
            assert ask.asks.stop <= prompt.num_queries
    assert len(prompt.asks) == 3


def test_the_plot_has_a_line_and_a_label_for_everybody() -> None:
    svg = drawing({"auto": {256: 0.6, 1024: 0.9}, "<b>": {256: 0.1, 1024: 0.2}})
    assert svg.count("<polyline") == 2
    assert "&lt;b&gt;" in svg


def test_each_policy_is_compared_with_the_oracle_over_its_own_units() -> None:
    every = bench_retrieval.choosers(["quest", "arkvale"])
    names = [chooser.name for chooser in (*every, *bench_retrieval.oracles(every))]
    assert len(set(names)) == len(names)
    assert all(bench_retrieval.baseline_of(chooser) in names for chooser in every)
    assert bench_retrieval.baseline_of(every[0]) != bench_retrieval.baseline_of(every[1])
    assert "streaming_llm" not in bench_retrieval.retrieving()
