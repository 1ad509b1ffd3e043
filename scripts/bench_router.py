"""How many requests a second the routing rule takes on one core, and how much memory it needs for each replica:
python scripts/bench_router.py --replicas 1000

Prompts of 2,204 tokens: a conversation whose first 125 blocks one replica holds (32 of them, the system prompt, all
do), and 12 new blocks. A request is routed, its first token and its blocks' events come, and it ends while 20 others a
replica are open. With --new, only the system prompt is known. Hashing the prompts is not part of it, since the
front-ends share that. No replica exists: these are the router's own limits.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tinyvllm.engine.routing import Route, Router, sample_hashes

BLOCK_SIZE = 16
SYSTEM_BLOCKS, OWN_BLOCKS, NEW_BLOCKS = 32, 93, 12
NUM_OPEN = 20  # requests a replica


def resident_bytes() -> int:
    """The process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def fill(router: Router, num_replicas: int, num_conversations: int, rng: random.Random) -> list[list[int]]:
    """Add replicas that hold conversations; return their hashes."""
    system_prompts = [make_hashes(rng, SYSTEM_BLOCKS) for _ in range(4)]
    conversations = []
    for name in range(num_replicas):
        router.add(name, max_num_seqs=128)
        for prompt in system_prompts:
            router.stored(name, sample_hashes(prompt, router.sampling))
        for index in range(num_conversations):
            own = make_hashes(rng, OWN_BLOCKS)
            router.stored(name, sample_hashes(own, router.sampling))
            if index < 20:
                conversations.append(rng.choice(system_prompts) + own)
    return conversations


def make_hashes(rng: random.Random, count: int) -> list[int]:
    return [rng.getrandbits(64) for _ in range(count)]


def serve(router: Router, prompts: list[list[int]], num_new: int) -> float:
    """Take all prompts through the router; return the seconds of processor time."""
    waiting: deque[Route] = deque()
    most = NUM_OPEN * len(router.replicas)
    start = time.process_time()
    for hashes in prompts:
        route = router.route(hashes, len(hashes) * BLOCK_SIZE + 12)
        router.prefilled(route)
        new = sample_hashes(hashes[-num_new:], router.sampling)
        router.stored(route.replica, new)
        router.removed(route.replica, new)  # the pool is full: as many blocks go as come
        waiting.append(route)
        if len(waiting) > most:
            router.finished(waiting.popleft())
    for route in waiting:
        router.finished(route)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=5000, help="blocks in each replica's prefix cache")
    parser.add_argument("--sampling", type=int, default=1, help="keep one hash in this many")
    parser.add_argument("--requests", type=int, default=40_000)
    parser.add_argument("--new", action="store_true", help="of each prompt only the system prompt is known")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rng = random.Random(0)
    router = Router(BLOCK_SIZE, args.sampling)
    gc.collect()
    before = resident_bytes()
    conversations = fill(router, args.replicas, args.blocks // OWN_BLOCKS, rng)
    own_bytes = sum(sys.getsizeof(hashes) for hashes in conversations)
    per_replica = (resident_bytes() - before - own_bytes) / args.replicas
    gc.freeze()  # the collector would walk all sets again and again: a router freezes what it has learned, too
    num_known, num_new = (SYSTEM_BLOCKS, OWN_BLOCKS + NEW_BLOCKS) if args.new else (None, NEW_BLOCKS)
    rates = []
    for _ in range(args.repeats):
        prompts = [rng.choice(conversations)[:num_known] + make_hashes(rng, num_new) for _ in range(args.requests)]
        rates.append(args.requests / serve(router, prompts, num_new))
    found = {
        "replicas": args.replicas,
        "blocks_kept_per_replica": router.num_blocks(0),
        "sampling": args.sampling,
        "is_new": args.new,
        "requests_per_s": [round(rate) for rate in sorted(rates)],
        "bytes_per_replica": round(per_replica),
    }
    print(f"{args.replicas} replicas with {args.blocks} blocks: {max(rates):,.0f} requests a second of processor time")
    print(f"{per_replica / 1e6:.2f} MB a replica, {per_replica / max(1, router.num_blocks(0)):.0f} bytes a block kept")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
