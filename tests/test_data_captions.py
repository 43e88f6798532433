"""Captioned sources: conventions of captions, splits, what is never opened, and what is missing or useless."""

import json
import pickle
import tarfile
from pathlib import Path

import pytest

from mmdiff.data.sources import load_source
from tests.captioned_media import KEYS, captions, folder_of, shard_of, videos, write_media


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.mark.parametrize("how", ["json", "txt", "metadata.jsonl", "metadata.csv", "metadata.csv text"])
def test_captions_of_every_convention(tmp_path, media, how):
    source = load_source(folder_of(tmp_path / "data", media, ".mp4", how), (".mp4",), val_share=0)
    items = source.splits["train"]
    assert [item.key for item in items] == KEYS
    expected = [captions(i)[:1] if "csv" in how else captions(i) for i in range(10)]
    assert [item.captions for item in items] == expected
    assert (items[3].meta.get("number") == 3) == (how in ("json", "metadata.jsonl"))
    assert not any(source.problems.values())


def test_json_goes_before_txt_and_txt_fills_in(tmp_path, media):
    root = folder_of(tmp_path / "data", media, ".mp4", "json", KEYS[:2])
    (root / f"{KEYS[0]}.txt").write_text("from txt")
    (root / f"{KEYS[1]}.txt").write_text("from txt")
    (root / f"{KEYS[1]}.json").write_text('{"number": 1}')
    items = load_source(root, (".mp4",), val_share=0).splits["train"]
    assert [item.captions[0] for item in items] == ["caption 0", "from txt"]


def test_splits_by_shard_folder_or_hash(tmp_path, media):
    for split, keys in (("train", KEYS[:6]), ("val", KEYS[6:8]), ("test", KEYS[8:])):
        shard_of(tmp_path / "tar" / f"{split}-000000.tar", media, ".mp4", keys)
        folder_of(tmp_path / "plain" / split, media, ".mp4", "json", keys)
    (tmp_path / "plain" / "val").rename(tmp_path / "plain" / "validation")
    for root in ("tar", "plain"):
        splits = load_source(tmp_path / root, (".mp4",)).splits
        assert {name: [item.key for item in items] for name, items in splits.items()} == {
            "train": KEYS[:6], "val": KEYS[6:8], "test": KEYS[8:]}  # fmt: skip
    folder_of(tmp_path / "flat", media, ".mp4", "json")
    shard_of(tmp_path / "one.tar", media, ".mp4")
    halves = [load_source(tmp_path / name, (".mp4",), val_share=0.4).splits for name in ("flat", "one.tar")]
    keys = [{name: [item.key for item in items] for name, items in splits.items()} for splits in halves]
    assert keys[0] == keys[1]
    assert sorted(keys[0]["train"] + keys[0]["val"]) == KEYS
    assert 1 <= len(keys[0]["val"]) <= 7
    assert len(load_source(tmp_path / "flat", (".mp4",), val_share=1e-9).splits["val"]) == 1, "never empty"
    for key in KEYS[:3]:  # membership does not depend on the other items
        (tmp_path / "flat" / f"{key}.mp4").unlink()
        (tmp_path / "flat" / f"{key}.json").unlink()
    fewer = load_source(tmp_path / "flat", (".mp4",), val_share=0.4).splits["val"]
    assert [item.key for item in fewer] == [key for key in keys[0]["val"] if key not in KEYS[:3]]


def test_metadata_file_above_the_split_folders(tmp_path, media):
    for split, keys in (("train", KEYS[:6]), ("val", KEYS[6:])):
        folder_of(tmp_path / "data" / split, media, ".mp4", "nothing", keys)
    rows = [{"file_name": f"{'train' if i < 6 else 'val'}/{key}.mp4", "text": f"t{i}"} for i, key in enumerate(KEYS)]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    splits = load_source(tmp_path / "data", (".mp4",)).splits
    assert [item.captions for item in splits["val"]] == [["t6"], ["t7"], ["t8"], ["t9"]]


class Trap:
    """Unpickling it is an error."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was loaded')",))


def test_pickles_and_other_members_are_never_opened(tmp_path, media):
    trap = pickle.dumps(Trap())
    more = {
        f"{KEYS[0]}.pyd": trap,
        f"{KEYS[0]}.pkl": trap,
        f"{KEYS[1]}.pth": trap,
        "other.pickle": trap,
        "x.mp4.pkl": trap,
    }
    shard = shard_of(tmp_path / "train-0.tar", media, ".mp4", more=more)
    source = load_source(shard, (".mp4",), val_share=0)
    assert [item.key for item in source.splits["train"]] == KEYS
    root = folder_of(tmp_path / "plain", media, ".mp4", "json")
    for name, data in more.items():
        (root / name).write_bytes(data)
    assert [item.key for item in load_source(root, (".mp4",), val_share=0).splits["train"]] == KEYS


def test_what_is_missing_is_named(tmp_path, media):
    more = {"lonely.json": b'{"caption": "no media"}', "bad.json": b"{", "bad.mp4": b"x", "mute.mp4": b"x"}
    shard = shard_of(tmp_path / "tar" / "train-0.tar", media, ".mp4", more=more)
    root = folder_of(tmp_path / "plain", media, ".mp4", "json")
    for name, data in more.items():
        (root / name).write_bytes(data)
    (root / "metadata.jsonl").write_text('{"file_name": "gone.mp4", "caption": "gone"}')
    (root / "LICENSE-CC-BY.txt").write_text("not a caption")
    for path, places in ((shard.parent, ("train-0.tar:lonely", "train-0.tar:bad.mp4", "train-0.tar:mute.mp4")),
                         (root, ("lonely.json", "bad.mp4", "mute.mp4", "gone.mp4"))):  # fmt: skip
        source = load_source(path, (".mp4",), val_share=0)
        assert len(source.splits["train"]) == 10
        problems = source.problems["train"]
        assert len(problems) == len(places)
        assert all(any(line.startswith(place) for line in problems) for place in places)
        with (
            pytest.warns(UserWarning, match="left out of train"),
            pytest.raises(ValueError, match="lack media or caption"),
        ):
            videos(path).setup()
        with pytest.warns(UserWarning, match="left out") as caught:
            videos(path, max_bad_share=0.5).setup()
        assert len(caught) == len(places)


def test_useless_sources_say_so(tmp_path, media):
    with pytest.raises(ValueError, match=r"path='.*nowhere' does not exist.*folder of media"):
        videos(tmp_path / "nowhere").prepare_data()
    with pytest.raises(ValueError, match="does not exist"):
        videos(tmp_path / "nowhere").setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no captioned media in .*empty.*looked for \.mp4"):
        videos(tmp_path / "empty").setup()
    root = folder_of(tmp_path / "mute", media, ".mp4", "nothing")
    with pytest.raises(ValueError, match=r"clip_00\.mp4: no caption.*\(10\); put a caption"):
        videos(root).setup()
    module = videos(root, caption="none")
    module.setup()
    assert next(iter(module.train_dataloader()))["caption"] == [""] * 4
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"packed\.tar: not a whole, uncompressed tar"):
        videos(tmp_path / "packed.tar").setup()
    shard = shard_of(tmp_path / "cut.tar", media, ".mp4")
    shard.write_bytes(shard.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"cut\.tar: not a whole"):
        videos(shard).setup()
    shard_of(tmp_path / "mix" / "train-0.tar", media, ".mp4")
    shard_of(tmp_path / "mix" / "more.tar", media, ".mp4")
    with pytest.raises(ValueError, match=r"more\.tar belongs to no split"):
        videos(tmp_path / "mix").setup()


def test_rows_of_a_metadata_file_that_lead_nowhere_are_told(tmp_path, media):
    root = folder_of(tmp_path / "data", media, ".mp4", "nothing", KEYS[:2])
    (tmp_path / "outside.mp4").write_bytes(b"x")
    names = [f"{KEYS[0]}.mp4", f"sub/../{KEYS[1]}.mp4", "../outside.mp4", str(tmp_path / "outside.mp4"), "n" * 300]
    rows = [json.dumps({"file_name": name, "caption": f"row {place}"}) for place, name in enumerate(names)]
    (root / "metadata.jsonl").write_text("\n".join(rows))
    source = load_source(root, (".mp4",), val_share=0)
    assert [item.captions for item in source.splits["train"]] == [["row 0"], ["row 1"]]
    lines = source.problems["train"]
    assert {line.where.partition(":")[2] for line in lines if "points outside" in line} == {"3", "4"}
    assert [line.kind for line in lines] == ["unreachable"] * 3


def test_a_tar_whose_header_leads_back_is_refused(tmp_path):
    member = tarfile.TarInfo("a.mp4")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" + (256**11 - 512).to_bytes(11, "big")  # a size of -512: the next header is this one
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(10240))
    with pytest.raises(ValueError, match="a.tar: not a whole"):
        load_source(tmp_path / "a.tar", (".mp4",))
