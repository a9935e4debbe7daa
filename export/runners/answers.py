"""Generation and conversations in each runner: prefills and decodes, chooses tokens, stops, answers messages."""

import os
import sys
import time

import numpy as np

LONGEST_LINE = 1 << 20


def steps(session, bundle, ids, limit, choose, whole=True, keep=0):
    """Prefills `ids`, then yields at most `limit` pairs (token, logits it was chosen from). All rows hold the same ids.

    The cache holds the first `keep` ids. Unless `whole`, the prompt is decoded too. The first step is not timed: it may
    compile."""
    if not 0 < len(ids) < bundle.slots:
        sys.exit(f"{len(ids)} tokens: expected 1 to {bundle.slots - 1}, because the cache has {bundle.slots} slots")
    vocabulary = bundle.manifest["config"]["vocab_size"]
    for token in (token for token in ids if not 0 <= token < vocabulary):
        sys.exit(f"id {token}: expected 0 to {vocabulary - 1}")
    rows = lambda value: np.full(bundle.batch, value, np.int32)  # noqa: E731
    if not keep:
        session.reset()
    session.seconds, session.count, length = 0.0, 0, keep
    while length < len(ids):
        # The padding of a bucket must fit the cache too; if no bucket fits, the ids are decoded token by token.
        fitting = [bucket for bucket in bundle.manifest["buckets"] if length + bucket <= bundle.slots and whole]
        bucket = next((bucket for bucket in fitting if bucket >= len(ids) - length), fitting[-1] if fitting else 1)
        part = ids[length : length + bucket]
        tokens = np.tile(np.array(part + [0] * (bucket - len(part)), np.int32), (bundle.batch, 1))
        inputs = {"tokens": tokens, "count": rows(len(part))} if fitting else {"token": tokens[:, 0]}
        logits = session.run(f"prefill_{bucket}" if fitting else "decode", {**inputs, "length": rows(length)})
        length += len(part)
    for made in range(1, limit + 1):
        if not np.isfinite(logits).all():
            sys.exit(f"the logits behind {length} tokens are not finite: the weights or this runtime are at fault")
        token = choose(logits[0])
        yield token, logits[0]
        if made == limit or length == bundle.slots:
            break
        start = time.perf_counter()
        logits = session.run("decode", {"token": rows(token), "length": rows(length)})
        if made > 1:
            session.seconds, session.count = session.seconds + time.perf_counter() - start, made - 1
        length += 1


def kept(logits, top_k, top_p):
    """Which tokens may be drawn: of the k likeliest, and those as likely as the k-th, the fewest that together have the
    probability p; of equally likely tokens the lower ids come first. Logits are divided by the temperature already."""
    order = np.argsort(-logits, kind="stable")
    ranked, keep = logits[order].astype(np.float64), np.zeros(len(logits), bool)
    may = ranked >= ranked[min(top_k or len(ranked), len(ranked)) - 1]
    chances = np.exp(ranked - ranked[0]) * may
    may &= (np.cumsum(chances) - chances < top_p * np.sum(chances)) | (top_p >= 1)
    keep[order] = may
    return keep


def chooser(temperature, seed, top_k=0, top_p=1.0):
    """Returns a function that chooses a token: greedily at temperature 0, else drawn as argmax with Gumbel noise."""
    noise = np.random.default_rng(seed).gumbel

    def choose(logits):
        noisy = logits + temperature * noise(size=logits.shape)
        if temperature and (top_k or top_p < 1):
            noisy = np.where(kept(logits / np.float32(temperature), top_k, top_p), noisy, -np.inf)
        return int(np.argmax(noisy))

    return choose


def write_until(generated, decode, ends, stops, out, before=b"", behind=b""):
    """Streams generated text up to the first stop text; a possible beginning of a stop text is held back.

    Returns the ids, the text's bytes, and whether a stop text or an id of `ends` ended it.
    """
    ids, data, shown, ended = [], b"", 0, False
    for token, _ in generated:
        out.write(b"" if ids else before)  # only when there is a first token
        ids.append(token)
        ended = token in ends
        if not ended:
            data += decode(token)
            hits = [place for place in (data.find(stop, shown) for stop in stops) if place >= 0]
            data, ended = (data[: min(hits)], True) if hits else (data, False)
        if ended:
            break
        held = max((n for stop in stops for n in range(len(stop)) if data.endswith(stop[:n])), default=0)
        out.write(data[shown : len(data) - held])
        out.flush()
        shown = len(data) - held
    data += b"" if ended and ids[-1] not in ends else decode(None)
    out.write(data[shown:] + behind)
    out.flush()
    return ids, data, ended


def conversation(text, form, messages):
    """Ids of a conversation. Messages are (role, text), the last is a user's; their text gives no control tokens."""
    made, before = [], form["system" if messages[0][0] == "system" else "begin"]
    for role, said in messages:
        if role == "assistant" and form["thinking_end"] and form["thinking_end"] in said:
            said = said.rpartition(form["thinking_end"])[2].lstrip(form["thinking_blank"])
        made += [*before, said.strip() if role != "assistant" or form["trims_answers"] else said]
        before = form[{"system": "behind_system", "user": "answer", "assistant": "next"}[role]]
    return form["bos"] + text.encode_pieces([*made, *form["reply"]], form["control"])


def lines():
    """Yields the lines of standard input that are not blank."""
    while True:
        print("> " * sys.stdin.isatty(), end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline(LONGEST_LINE).decode("utf-8")
        if not line:
            return
        if line.strip():
            yield line


def converse(session, bundle, text, options, choose, stops, out):
    """Answers each line of input, or the prompt. The cache keeps the longest prefix that the next turn shares."""
    form, said, held, most = bundle.manifest["chat"], [], [], options.max_new_tokens
    spare, fewest = bundle.manifest["cache"].get("spare"), 0
    first = [("system", options.system)] if options.system.strip() else []
    for line in lines() if options.prompt is None else [options.prompt]:
        said.append(("user", line))
        ids, count = conversation(text, form, first + said), len(said)
        while len(ids) + most > bundle.slots and len(said) > 2:
            del said[:2]
            ids = conversation(text, form, first + said)
        if len(ids) + most > bundle.slots:
            sys.exit(f"{len(ids)} tokens and {most} to make: expected at most the cache's {bundle.slots} slots in all")
        if len(said) < count:
            print(f"the window is full: the oldest {count - len(said)} messages are forgotten", file=sys.stderr)
        keep = min(len(os.path.commonprefix([ids, held])), len(ids) - 1)
        keep *= keep >= fewest  # newer tokens may have replaced what a shorter text needs
        generated = steps(session, bundle, ids, most, choose, keep=keep)
        made, data, ended = write_until(generated, text.decoder([]), form["stop"], stops, out, behind=b"\n")
        said.append(("assistant", data.decode("utf-8", "replace")))
        held = ids + made[:-1]
        fewest = 0 if spare is None else max(min(fewest, keep), len(held) - spare)
        rate = f", {session.count / session.seconds:.1f} tokens/s" if session.seconds else ""
        used = f"{len(ids) - keep} tokens read, {len(made)} made{rate}; {len(held) + 1} of {bundle.slots} slots"
        print(used + "; cut: --max_new_tokens allows more" * (not ended), file=sys.stderr, flush=True)
