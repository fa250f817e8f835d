"""NumPy and Paddle versions of the custom ops that FastDeploy calls in prefill and decode.

Parameter order is FastDeploy's own; ``_write`` stands for an output that an op writes in place.
Everything runs on whole arrays of a few requests: clarity over speed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

OPS: dict[str, Callable[..., Any]] = {}
BANNED = -1e10


def _op(function: Callable[..., Any]) -> Callable[..., Any]:
    OPS[function.__name__] = function
    return function


def _flat(*tensors: Any) -> tuple[np.ndarray, ...]:
    return tuple(t.numpy().reshape(-1) for t in tensors)


def _write(tensor: Any, array: np.ndarray) -> None:
    import paddle

    tensor.copy_(paddle.to_tensor(array.reshape(tensor.shape), dtype=tensor.dtype), True)


def _write_all(*pairs: tuple[Any, np.ndarray]) -> None:
    for tensor, array in pairs:
        _write(tensor, array)


@_op
def get_padding_offset(input_ids, seq_len, draft_tokens, seq_lens_encoder, cpu_token_num):
    import paddle

    ids, (lens,) = input_ids.numpy(), _flat(seq_len)
    num_tokens, batch = int(cpu_token_num), len(lens)
    packed = np.full([num_tokens], 2, "int64")
    owner = np.full([num_tokens], -1, "int32")
    cu = np.zeros([batch + 1], "int32")
    cu[1:] = np.cumsum(lens)
    for b in range(batch):
        packed[cu[b] : cu[b + 1]] = ids[b, : lens[b]]
        owner[cu[b] : cu[b + 1]] = b
    return tuple(paddle.to_tensor(a) for a in (packed, owner, cu, cu.copy()))


@_op
def rebuild_padding(
    tmp_out,
    cu_seqlens_q,
    seq_len_this_time,
    seq_lens_decoder,
    seq_lens_encoder,
    batch_id_per_token_output=None,
    cu_seqlens_q_output=None,
    first_token_out=None,
    enable_logprob=False,
):
    import paddle

    assert batch_id_per_token_output is None, "speculative decoding is not in the CPU shim"
    cu, this_time, decoder, encoder = _flat(
        cu_seqlens_q, seq_len_this_time, seq_lens_decoder, seq_lens_encoder
    )
    out = paddle.zeros([len(cu) - 1, tmp_out.shape[1]], dtype=tmp_out.dtype)
    for b in range(len(cu) - 1):
        if this_time[b] == 0 or (decoder[b] == 0 and encoder[b] == 0):
            continue
        out[b] = tmp_out[int(cu[b] + max(encoder[b] - 1, 0))]
    return out


@_op
def recover_decode_task(
    stop_flags,
    seq_lens_this_time,
    seq_lens_encoder,
    seq_lens_decoder,
    step_seq_lens_decoder,
    block_tables,
    is_block_step,
    draft_tokens,
    step_draft_tokens,
    step_seq_lens_this_time,
    block_size,
    max_draft_tokens,
):
    (waiting,) = _flat(is_block_step)
    if not waiting.any():
        return
    stopped, this_time, encoder, decoder, resume_at = _flat(
        stop_flags, seq_lens_this_time, seq_lens_encoder, seq_lens_decoder, step_seq_lens_decoder
    )
    tables = block_tables.numpy()
    for b in range(len(this_time)):
        if waiting[b] and tables[b, resume_at[b] // block_size] != -1:
            waiting[b] = stopped[b] = False
            this_time[b], encoder[b], decoder[b] = 1, 0, resume_at[b]
    _write_all(
        (is_block_step, waiting),
        (seq_lens_this_time, this_time),
        (stop_flags, stopped),
        (seq_lens_encoder, encoder),
        (seq_lens_decoder, decoder),
    )


@_op
def set_value_by_flags_and_idx(
    token_ids_all,
    input_ids,
    seq_lens_this_time,
    seq_lens_encoder,
    seq_lens_decoder,
    prompt_lens,
    step_idx,
    stop_flags,
):
    ids = input_ids.numpy()
    encoder, decoder, prompts, steps, stopped = _flat(
        seq_lens_encoder, seq_lens_decoder, prompt_lens, step_idx, stop_flags
    )
    for b in range(seq_lens_this_time.shape[0]):
        if stopped[b] or (decoder[b] == 0 and encoder[b] == 0) or steps[b] <= 0:
            continue
        position = int(prompts[b] + steps[b])
        if position < token_ids_all.shape[1]:
            token_ids_all[b, position] = int(ids[b, max(encoder[b] - 1, 0)])


@_op
def set_stop_value_multi_ends(
    topk_ids,
    stop_flags,
    seq_lens,
    end_ids,
    next_tokens,
    token_ids_all,
    prompt_lens,
    step_idx,
    stop_seqs,
    stop_seqs_len,
    min_tokens,
    beam_search,
):
    tokens, stopped, following, lens, ends, prompts, steps, least = _flat(
        topk_ids, stop_flags, next_tokens, seq_lens, end_ids, prompt_lens, step_idx, min_tokens
    )
    history, sequences, sequence_lens = (
        token_ids_all.numpy(),
        stop_seqs.numpy(),
        stop_seqs_len.numpy(),
    )
    stops_after_one = os.environ.get("PREFILL_NODE_ONE_STEP_STOP", "").startswith("1")
    for b in range(len(tokens)):
        may_stop = steps[b] >= least[b]
        if stops_after_one:
            stopped[b] = True
            if lens[b] == 0:
                tokens[b] = -1
            following[b] = tokens[b]
        elif stopped[b]:
            if lens[b] == 0:
                tokens[b] = -1
            else:
                tokens[b] = following[b] = ends[0]
        else:
            following[b] = tokens[b]
        if not may_stop:
            continue
        if not beam_search and tokens[b] in ends:
            stopped[b] = True
            tokens[b] = following[b] = ends[0]
        generated = history[b, prompts[b] :]
        for s in range(sequences.shape[1]):
            n = int(sequence_lens[b, s])
            if 0 < n <= steps[b] and list(generated[steps[b] - n : steps[b]]) == list(
                sequences[b, s, :n]
            ):
                following[b] = tokens[b] = ends[0]
                stopped[b] = True
    _write_all((topk_ids, tokens), (stop_flags, stopped), (next_tokens, following))


@_op
def update_inputs_v1(
    stop_flags,
    not_need_stop,
    seq_lens_this_time,
    seq_lens_encoder,
    seq_lens_decoder,
    step_seq_lens_decoder,
    prompt_lens,
    topk_ids,
    input_ids,
    block_tables,
    next_tokens,
    is_block_step,
    block_size,
):
    stopped, this_time, encoder, decoder, resume_at, prompts, tokens, following, waiting = _flat(
        stop_flags,
        seq_lens_this_time,
        seq_lens_encoder,
        seq_lens_decoder,
        step_seq_lens_decoder,
        prompt_lens,
        topk_ids,
        next_tokens,
        is_block_step,
    )
    tables = block_tables.numpy()
    stops_after_one = os.environ.get("PREFILL_NODE_ONE_STEP_STOP_V1", "").startswith("1")
    num_stopped = len(stopped) - len(this_time)
    for b in range(len(this_time)):
        is_prefilled = this_time[b] + decoder[b] >= prompts[b]
        if stopped[b] or not is_prefilled or stops_after_one:
            if not is_prefilled:
                tokens[b] = -1
            stopped[b] = True
            this_time[b] = decoder[b] = encoder[b] = 0
            num_stopped += 1
            continue
        decoder[b] += this_time[b]
        this_time[b], encoder[b] = 1, 0
        input_ids[b, 0] = int(following[b])
        if tables[b, decoder[b] // block_size] == -1:
            waiting[b] = stopped[b] = True
            resume_at[b] = decoder[b]
            this_time[b] = decoder[b] = 0
            num_stopped += 1
    _write_all(
        (stop_flags, stopped),
        (seq_lens_this_time, this_time),
        (seq_lens_encoder, encoder),
        (seq_lens_decoder, decoder),
        (step_seq_lens_decoder, resume_at),
        (topk_ids, tokens),
        (is_block_step, waiting),
    )
    not_need_stop[0] = bool(num_stopped < len(stopped))


@_op
def get_token_penalty_multi_scores(
    token_ids_all,
    logits,
    penalty_scores,
    frequency_scores,
    presence_scores,
    temperatures,
    bad_tokens,
    bad_tokens_lens,
    prompt_lens,
    cur_dec_lens,
    min_dec_lens,
    eos_token_id,
):
    scores = logits.numpy().astype("float32")
    history, bad = token_ids_all.numpy(), bad_tokens.numpy()
    prompts, generated, least, eos, repetition, frequency, presence, temperature, num_bad = _flat(
        prompt_lens,
        cur_dec_lens,
        min_dec_lens,
        eos_token_id,
        penalty_scores,
        frequency_scores,
        presence_scores,
        temperatures,
        bad_tokens_lens,
    )
    vocab = scores.shape[1]
    for b in range(scores.shape[0]):
        if 0 <= generated[b] < least[b]:
            scores[b, eos] = BANNED
        if repetition[b] != 1 or frequency[b] != 0 or presence[b] != 0:
            prompt, reply = history[b, : prompts[b]], history[b, prompts[b] :]
            count = np.bincount(reply[reply >= 0], minlength=vocab)[:vocab]
            seen = count > 0
            seen[prompt[(prompt >= 0) & (prompt < vocab)]] = True
            row = scores[b]
            row = np.where(seen, np.where(row < 0, row * repetition[b], row / repetition[b]), row)
            scores[b] = row - count * frequency[b] - (count > 0) * presence[b]
        if temperature[b] != 1:
            scores[b] /= temperature[b]
        words = bad[b, : min(num_bad[b], bad.shape[1])]
        scores[b, words[(words >= 0) & (words < vocab)]] = BANNED
    _write(logits, scores)
    return logits


@_op
def limit_thinking_content_length(
    next_tokens,
    max_think_lens,
    max_reply_lens,
    step_idx,
    limit_status,
    stop_flags,
    eos_token_ids,
    inject_token_ids,
    think_end_id,
    splitwise_role_is_decode,
):
    tokens, think, reply, steps, status, stopped, eos, injected = _flat(
        next_tokens,
        max_think_lens,
        max_reply_lens,
        step_idx,
        limit_status,
        stop_flags,
        eos_token_ids,
        inject_token_ids,
    )
    n = len(injected)
    done = n + 1 if n else 1
    base = done + 1
    for b in range(len(tokens)):
        if stopped[b] or (think[b] < 0 and reply[b] < 0):
            continue
        s = before = max(int(status[b]), 0)
        if s == 0 and tokens[b] == think_end_id:
            s = done
            reply[b] += 2 if reply[b] >= 0 else 0
        if think[b] >= 0 and s < base:
            if s == 0 and think[b] > 0 and steps[b] == think[b]:
                s = 1 if n else done
            elif s == 0 and think[b] == 0 and splitwise_role_is_decode:
                s = 2 if n else done + 1
            elif s == 0 and think[b] == 0:
                s = 1 if n else done
            if s == 0 and n and tokens[b] in eos:
                s = 1
            if n and 1 <= s <= n:
                tokens[b] = injected[s - 1]
                s = min(s + 1, done)
        if reply[b] >= 0 and not (s == done and before != done and before < base):
            s = base if s == done else s
            if s >= base:
                if s - base >= reply[b]:
                    tokens[b] = eos[0]
                    s = base + reply[b]
                else:
                    s += 1
        status[b] = s
    _write_all((next_tokens, tokens), (limit_status, status), (max_reply_lens, reply))


@_op
def custom_numpy_to_tensor(array, tensor):
    _write(tensor, np.ascontiguousarray(array))
    return tensor


@_op
def set_data_ipc(*args, **kwargs):
    return None


@_op
def unset_data_ipc(*args, **kwargs):
    return None


@_op
def get_block_shape_and_split_kv_block(*args, **kwargs):
    """Splits work over thread blocks; :func:`append_attention` below needs no split."""


@_op
def top_k_renorm_probs(probs, top_k):
    import paddle

    kept, (k,) = probs.numpy(), _flat(top_k)
    for b in range(kept.shape[0]):
        if 0 < k[b] < kept.shape[1]:
            kept[b][np.argsort(-kept[b], kind="stable")[int(k[b]) :]] = 0
    return paddle.to_tensor(kept / kept.sum(-1, keepdims=True))


@_op
def min_p_sampling(probs, min_p):
    import paddle

    floor = probs.max(-1, keepdim=True) * min_p[: probs.shape[0]].reshape([-1, 1])
    return paddle.where(probs < floor, paddle.zeros_like(probs), probs)


def _rotate(x, cos, sin, neox):
    """x ``[tokens, heads, head_dim]``; cos, sin ``[tokens, 1, rotary_dim or half of it]``."""
    import paddle

    if neox:
        rotary_dim = cos.shape[-1]
        turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
        low, high = turned[..., : rotary_dim // 2], turned[..., rotary_dim // 2 :]
        turned = turned * cos + paddle.concat([-high, low], -1) * sin
        return paddle.concat([turned, kept], -1) if kept.shape[-1] else turned
    even, odd = x[..., 0::2], x[..., 1::2]
    return paddle.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def _page_spans(past: int, num_tokens: int, page_size: int):
    """(page index, offset, first token, tokens) for each page that new tokens touch."""
    position = past
    while position < past + num_tokens:
        offset = position % page_size
        count = min(page_size - offset, past + num_tokens - position)
        yield position // page_size, offset, position - past, count
        position += count


@_op
def append_attention(
    qkv,
    key_cache,
    value_cache,
    seq_lens_encoder,
    seq_lens_decoder,
    seq_lens_this_time,
    batch_id_per_token,
    cu_seqlens_q,
    block_tables,
    *rest,
):
    """Rotates, writes the pages and attends densely. ``rest`` is in FastDeploy's own order."""
    import paddle
    import paddle.nn.functional as F

    rotary, mask, bias = rest[10], rest[11], rest[12]
    q_norm, k_norm, eps = rest[24], rest[25], rest[27]
    neox, causal, sliding_window = rest[30], rest[41], rest[43]
    assert mask is None and not sliding_window, "no mask or sliding window in the CPU shim"
    _, num_kv_heads, page_size, head_dim = key_cache.shape
    num_q_heads = qkv.shape[-1] // head_dim - 2 * num_kv_heads
    rows = (qkv if bias is None else qkv + bias).astype("float32")
    rows = rows.reshape([-1, num_q_heads + 2 * num_kv_heads, head_dim])
    out = paddle.zeros([qkv.shape[0], num_q_heads, head_dim], dtype="float32")
    this_time, decoder, cu = _flat(seq_lens_this_time, seq_lens_decoder, cu_seqlens_q)
    tables = block_tables.numpy()

    def gather(cache, pages, length):
        kept = paddle.index_select(cache, pages, 0).astype("float32").transpose([1, 0, 2, 3])
        kept = kept.reshape([num_kv_heads, -1, head_dim])[:, :length]
        return kept.repeat_interleave(num_q_heads // num_kv_heads, 0)

    for b in range(len(this_time)):
        n, past = int(this_time[b]), int(decoder[b])
        if n == 0:
            continue
        own = slice(int(cu[b]), int(cu[b]) + n)
        q, k, v = rows[own].split([num_q_heads, num_kv_heads, num_kv_heads], 1)
        cos, sin = (rotary[i, 0, past : past + n].astype("float32") for i in (0, 1))
        q, k = _rotate(q, cos, sin, neox), _rotate(k, cos, sin, neox)
        if q_norm is not None:
            q = q * paddle.rsqrt((q * q).mean(-1, keepdim=True) + eps) * q_norm
        if k_norm is not None:
            k = k * paddle.rsqrt((k * k).mean(-1, keepdim=True) + eps) * k_norm
        for index, offset, first, count in _page_spans(past, n, page_size):
            page = int(tables[b, index])
            assert page >= 0, f"request {b} has no page for block {index}: {tables[b]}"
            for cache, new in ((key_cache, k), (value_cache, v)):
                written = new[first : first + count].transpose([1, 0, 2]).astype(cache.dtype)
                cache[page, :, offset : offset + count] = written
        length = past + n
        pages = paddle.to_tensor(tables[b, : -(-length // page_size)])
        scores = paddle.matmul(
            q.transpose([1, 0, 2]) * head_dim**-0.5,
            gather(key_cache, pages, length),
            transpose_y=True,
        )
        if causal:
            scores = scores + paddle.triu(paddle.full([n, length], -1e30), past + 1)
        attended = paddle.matmul(F.softmax(scores, -1), gather(value_cache, pages, length))
        out[own] = attended.transpose([1, 0, 2])
    return out.reshape([qkv.shape[0], num_q_heads * head_dim]).astype(qkv.dtype)


def fused_bias_act(x, bias=None, act_method="gelu", **kwargs):
    """Paddle's GPU-only fused activation."""
    import paddle.nn.functional as F

    x = x if bias is None else x + bias
    if act_method in ("swiglu", "silu"):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    return getattr(F, act_method)(x)


def top_p_sampling(x, ps, threshold=None, topp_seed=None, seed=-1, k=0, mode="truncated", **kwargs):
    """Paddle's GPU-only nucleus sampling; seeds give other numbers than on a GPU."""
    import paddle

    probs, (top_p,) = x.numpy().astype("float64"), _flat(ps)
    seeds = [None] * probs.shape[0] if topp_seed is None else [int(s) for s in _flat(topp_seed)[0]]
    ids = []
    for row, p, row_seed in zip(probs, top_p, seeds, strict=False):
        order = np.argsort(-row, kind="stable")
        kept = order[: max(1, int(np.searchsorted(np.cumsum(row[order]), p) + 1))]
        rng = np.random.default_rng(row_seed)
        ids.append(rng.choice(kept, p=row[kept] / row[kept].sum()))
    chosen = np.array(ids, "int64")[:, None]
    scores = np.take_along_axis(probs, chosen, 1).astype("float32")
    return paddle.to_tensor(scores), paddle.to_tensor(chosen)


def seeded_gumbel_noise(probs, seeds):
    """Exponential noise of mean 1, seeded a row."""
    import paddle

    size = probs.shape[1]
    rows = [np.random.default_rng(int(s)).exponential(size=size) for s in seeds.numpy().reshape(-1)]
    return paddle.to_tensor(np.stack(rows).astype("float32") + 1e-10)
