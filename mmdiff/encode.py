"""`mmdiff encode`: latents of a config's clips and embeddings of its captions, before training."""

from typing import TYPE_CHECKING, Any

from .generate import Parser

if TYPE_CHECKING:
    from .data.cache import Encoding, LatentCache


def sentence(found: "Encoding", cache: "LatentCache") -> str:
    """What was there and made, in how much room, and what it saves."""
    kinds: dict[str, int] = {}
    for problem in found.bad:
        kinds[problem.kind] = kinds.get(problem.kind, 0) + 1
    why = f" ({', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))})" if kinds else ""
    lines = [
        f"{cache.folder}: {found.there} there, {found.made} made, {len(found.bad)} bad{why}, "
        f"{found.bytes / 2**20:.1f} MiB in {found.there + found.made} entries"
    ]
    if found.made:
        lines.append(f"made in {found.seconds:.1f} s, {found.made / found.seconds:.1f} clips/s")
    clips = len(cache.data.datasets["train"])
    if found.clip_s and clips:
        ours, theirs = clips * found.read_s, clips * found.clip_s
        lines.append(
            f"an epoch of {clips} clips reads latents in {ours:.2f} s where decoding and encoding take {theirs:.2f} s: "
            f"{max(0.0, theirs - ours):.2f} s saved"
        )
    return "\n".join(lines)


def captions(data: Any) -> list[str]:
    """Those that an epoch may ask for, of a data module whose items are known beforehand."""
    data.prepare_data()
    data.setup()
    inner = getattr(data, "data", data)  # that of a LatentCache
    items = [item for dataset in getattr(inner, "datasets", {}).values() for item in dataset.items]
    choice = getattr(inner, "caption", "none")
    if choice == "none":
        return []
    return [caption for item in items for caption in (item.captions[:1] if choice == "first" else item.captions)]


def main(args: list[str]) -> int:
    """Encodes a config's clips and captions ahead of training, into its latent and text caches."""
    parser = Parser(
        "mmdiff encode",
        description=f"{main.__doc__} The config's data is a mmdiff.data.cache.LatentCache, or its text encoder a "
        "mmdiff.data.cache_text.CachedText, or both. What is there already is checked and kept.",
    )
    parser.add_argument("config", metavar="CONFIG", help="of mmdiff fit; BASE.yaml+VARIANT.yaml is two -c")
    parser.add_argument("--device", metavar="auto|cpu|cuda", help="where to encode (default: the config's)")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="package that the config may also name"
    )
    given = parser.parse_args(args)

    from .data.cache import LatentCache
    from .data.cache_text import CachedText
    from .footprint import instantiate
    from .generate import pick_device
    from .io import trust_policy

    trust_policy(given.trust)
    if given.device is not None:
        pick_device(given.device)  # before the long work
    module, data, _ = instantiate(given.config)
    texts = [part for part in module.modules() if isinstance(part, CachedText)]
    if not (texts or isinstance(data, LatentCache)):
        raise ValueError(
            f"{given.config} caches nothing: its data is a {type(data).__name__}, its text encoder no CachedText; "
            "wrap the data in mmdiff.data.cache.LatentCache"
        )
    if isinstance(data, LatentCache):
        data.device = given.device or data.device
        print(sentence(data.encode(), data))
    for text in texts:
        text.to(pick_device(given.device or "auto"))
        there, made = text.fill(captions(data))
        print(f"{text.folder}: {there} prompts there, {made} made, the empty one among them")
    return 0
