"""A checkpoint appears whole or not at all."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.writer import CheckpointWriter
from quant.errors import CheckpointError, OutputError, QualityError, Terminated, WriteError
from tests.quant.checkpoint.stored_modules import awq_config, random_weight

CONFIG: dict[str, object] = {
    "model_type": "llama",
    "quantization_config": awq_config(32, ("lm_head",)),
}


def hidden_folders(directory: Path) -> list[Path]:
    return list(directory.glob(".*"))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_modules=st.integers(1, 4), shard_bytes=st.sampled_from([1, 1500, 10**9]), seed=st.integers(0, 100))
def test_what_is_written_is_read_back(
    num_modules: int, shard_bytes: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # given a few quantized modules and a plain tensor
    out = tmp_path_factory.mktemp("round_trip") / "out"
    weights = {f"layers.{index}.proj": random_weight(16, 96, 32, seed + index) for index in range(num_modules)}

    # when they are written, in shards of some size, and read back
    with CheckpointWriter(out, expected_bytes=0, shard_bytes=shard_bytes) as writer:
        writer.add_tensor("norm.weight", torch.arange(5).bfloat16())
        for name, weight in weights.items():
            writer.add_packed(name, weight)
        writer.commit(CONFIG, {"tokenizer.json": b"{}"})
    reader = CheckpointReader.open(out)

    # then nothing changed
    assert reader.config == CONFIG
    assert torch.equal(reader.read_tensor("norm.weight"), torch.arange(5).bfloat16())
    assert set(reader.quantized_module_names) == set(weights)
    for name, weight in weights.items():
        read = reader.read_packed(name)
        assert torch.equal(read.codes, weight.codes)
        assert torch.equal(read.zeros, weight.zeros)
        assert torch.equal(read.scales, weight.scales)


def test_a_small_checkpoint_is_one_file_without_an_index(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", expected_bytes=0) as writer:
        writer.add_tensor("a.weight", torch.ones(3))
        writer.commit(CONFIG, {"report.json": b"{}"})

    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "report.json"}
    assert hidden_folders(tmp_path) == []


def test_everybody_may_read_a_checkpoint(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", expected_bytes=0) as writer:
        writer.add_tensor("a.weight", torch.ones(3))
        writer.commit(CONFIG, {})

    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


def test_a_large_checkpoint_is_sharded_as_its_index_says(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", expected_bytes=0, shard_bytes=100) as writer:
        for index in range(3):
            writer.add_tensor(f"layers.{index}.weight", torch.full((20,), float(index)))
        writer.commit(CONFIG, {})

    index_json = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index_json["metadata"]["total_size"] == 240
    assert index_json["weight_map"]["layers.2.weight"] == "model-00003-of-00003.safetensors"
    for name, file in index_json["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)


def test_a_tensor_changed_after_it_was_added_is_written_as_it_was(tmp_path: Path) -> None:
    tensor = torch.ones(4)
    with CheckpointWriter(tmp_path / "out", expected_bytes=0) as writer:
        writer.add_tensor("a.weight", tensor)
        tensor.zero_()
        writer.commit(CONFIG, {})

    assert CheckpointReader.open(tmp_path / "out").read_tensor("a.weight").tolist() == [1, 1, 1, 1]


def test_a_tied_tensor_and_a_transposed_view_are_written(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    with CheckpointWriter(tmp_path / "out", expected_bytes=0) as writer:
        writer.add_tensor("a.weight", tensor)
        writer.add_tensor("b.weight", tensor)
        writer.add_tensor("c.weight", tensor.T)
        writer.commit(CONFIG, {})

    reader = CheckpointReader.open(tmp_path / "out")
    assert torch.equal(reader.read_tensor("b.weight"), tensor)
    assert torch.equal(reader.read_tensor("c.weight"), tensor.T)


def test_a_name_added_twice_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", expected_bytes=0) as writer:
        writer.add_tensor("a.weight", torch.ones(1))
        with pytest.raises(ValueError, match=r"a\.weight was added"):
            writer.add_tensor("a.weight", torch.ones(1))


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with pytest.raises(OutputError, match="out exists already"):
        CheckpointWriter(tmp_path / "out", expected_bytes=0)


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", expected_bytes=0) as writer:
        writer.add_tensor("a.weight", torch.ones(1))
        (tmp_path / "out").mkdir()
        with pytest.raises(OutputError, match="appeared while"):
            writer.commit(CONFIG, {})

    assert list((tmp_path / "out").iterdir()) == []
    assert hidden_folders(tmp_path) == []


def test_a_disk_with_too_little_room_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs about 1000000000000\.0 MB, but .* has [0-9.]+ MB free"):
        CheckpointWriter(tmp_path / "out", expected_bytes=10**18)

    assert hidden_folders(tmp_path) == []


def test_a_place_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OutputError, match="cannot be written"):
        CheckpointWriter(tmp_path / "file" / "out", expected_bytes=0)


def write_and_fail(out: Path) -> None:
    with CheckpointWriter(out, expected_bytes=0, shard_bytes=1) as writer:
        writer.add_tensor("a.weight", torch.ones(1))
        writer.add_tensor("b.weight", torch.ones(1))
        raise RuntimeError("calibration failed")


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="calibration failed"):
        write_and_fail(tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def save_and_end(out: Path, error: BaseException) -> None:
    with CheckpointWriter(out, expected_bytes=0) as writer:
        writer.save_finished("part.safetensors", {"a": torch.ones(2)}, {"note": "kept"})
        writer.add_tensor("a.weight", torch.ones(1))
        raise error


@pytest.mark.parametrize(
    "error",
    [WriteError("disk full"), Terminated(), QualityError("the mean KL is high")],
    ids=["disk full", "terminated", "refused quality"],
)
def test_what_was_saved_as_finished_outlives_a_full_disk_a_termination_and_a_refused_quality(
    error: BaseException, tmp_path: Path
) -> None:
    # given a run that saved a part and ended in a way that another run need not
    out = tmp_path / "out"
    with pytest.raises(type(error)):
        save_and_end(out, error)

    # then a later one finds the part, beside an empty checkpoint
    offered: list[Path] = []

    def accepts(finished: Path) -> bool:
        offered.append(finished)
        return True

    with CheckpointWriter(out, expected_bytes=0, accepts=accepts) as writer:
        assert offered == [writer.finished]
        assert load_file(writer.finished / "part.safetensors")["a"].tolist() == [1, 1]
        assert list(writer.directory.iterdir()) == []
        writer.add_tensor("a.weight", torch.ones(1))
        writer.commit(CONFIG, {})
    assert list(tmp_path.iterdir()) == [out]


def test_what_was_saved_as_finished_does_not_outlive_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        save_and_end(tmp_path / "new" / "out", RuntimeError("calibration failed"))

    assert list(tmp_path.iterdir()) == []


def test_finished_work_waits_while_the_disk_has_too_little_room_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(Terminated):
        save_and_end(tmp_path / "out", Terminated())

    with pytest.raises(OutputError, match="free some space"):
        CheckpointWriter(tmp_path / "out", expected_bytes=10**18, accepts=lambda _finished: True)

    (folder,) = hidden_folders(tmp_path)
    assert [file.name for file in (folder / "finished").iterdir()] == ["part.safetensors"]


def test_a_checkpoint_that_does_not_read_back_is_not_committed(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", expected_bytes=0) as writer:
        writer.add_packed("proj", random_weight(16, 96, 32))
        with pytest.raises(CheckpointError, match="has no quantization_config"):
            writer.commit({"model_type": "llama"}, {})

    assert list(tmp_path.iterdir()) == []


FILL_A_LIMITED_DISK = """
import resource, sys
import torch
from pathlib import Path
from quant.checkpoint.writer import CheckpointWriter
from quant.errors import OutputError

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with CheckpointWriter(Path(sys.argv[1]), expected_bytes=400_000) as writer:
        writer.add_tensor("a.weight", torch.ones(100_000))
        writer.commit({}, {})
except OutputError as error:
    print(error)
"""


def test_a_write_that_fails_halfway_says_so_with_the_numbers(tmp_path: Path) -> None:
    # given a process whose files may not grow over 100 kB, a stand-in for a full disk
    command = [sys.executable, "-c", FILL_A_LIMITED_DISK, str(tmp_path / "out")]

    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    assert "out cannot be written" in result.stdout
    assert "needs about 400 kB" in result.stdout
    assert "were free" in result.stdout
    assert list(tmp_path.iterdir()) == []


WRITE_AND_WAIT = """
import sys
import torch
from pathlib import Path
from quant.checkpoint.writer import CheckpointWriter

writer = CheckpointWriter(Path(sys.argv[1]), expected_bytes=0, shard_bytes=1)
writer.add_tensor("a.weight", torch.ones(10))
writer.add_tensor("b.weight", torch.ones(10))
(writer.directory / "config.json").write_text("{}")
print("written", flush=True)
sys.stdin.read()
"""


def start_writing(out: Path) -> subprocess.Popen[str]:
    """A process that has written half a checkpoint and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_WAIT, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def test_a_killed_run_leaves_nothing_that_looks_finished_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    # given a run that was killed in the middle of its work
    out = tmp_path / "out"
    process = start_writing(out)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)

    # then there is no checkpoint, only a hidden folder
    assert not out.exists()
    (left_over,) = hidden_folders(tmp_path)

    # and the next run for the same place removes it
    with CheckpointWriter(out, expected_bytes=0) as writer:
        assert not left_over.exists()
        writer.add_tensor("a.weight", torch.ones(1))
        writer.commit(CONFIG, {})
    assert list(tmp_path.iterdir()) == [out]


def test_the_folder_of_a_living_run_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_writing(out)
    try:
        (other,) = hidden_folders(tmp_path)
        with CheckpointWriter(out, expected_bytes=0):
            assert other.is_dir()
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_a_folder_of_another_output_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / ".out2.partial-abc"
    other.mkdir()

    with CheckpointWriter(tmp_path / "out", expected_bytes=0):
        assert other.is_dir()
