"""Settings come from flags, environment and file in that order, and what is wrong is told in one sentence."""

from pathlib import Path

import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

from server.engine.config import AdapterConfig
from server.settings import Settings, SettingsError, is_loopback, load_settings
from server.settings_flags import add_settings_command


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"AWQ_SERVE_{name.upper()}", raising=False)
    monkeypatch.delenv("AWQ_SERVE_CONFIG", raising=False)
    monkeypatch.delenv("AWQ_SERVE_API_KEY", raising=False)


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "settings.toml", "port = 1\nmax_num_seqs = 1\nmax_waiting = 1\n")
    monkeypatch.setenv("AWQ_SERVE_PORT", "2")
    monkeypatch.setenv("AWQ_SERVE_MAX_NUM_SEQS", "2")
    settings = load_settings({"port": "3"}, file)
    assert (settings.port, settings.max_num_seqs, settings.max_waiting, settings.max_prompts) == (3, 2, 1, 128)


def test_a_flag_switches_off_what_the_environment_switches_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_SERVE_DETERMINISTIC", "true")
    seen: list[Settings] = []
    app = typer.Typer()
    app.callback()(lambda: None)
    add_settings_command(app, "serve", lambda flags, file: seen.append(load_settings(flags, file)))
    runner = CliRunner()
    for flags in ([], ["--no-deterministic"], ["--no-prefix-caching"]):
        assert runner.invoke(app, ["serve", *flags]).exit_code == 0
    assert [one.deterministic for one in seen] == [True, False, True]
    assert [one.prefix_caching for one in seen] == [True, True, False]


def test_the_environment_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_SERVE_CONFIG", str(write(tmp_path / "settings.toml", "port = 4321\n")))
    assert load_settings({}).port == 4321


@pytest.mark.parametrize(
    ("given", "num_bytes"), [("1000", 1000), (1000, 1000), ("512MiB", 2**29), ("1.5GiB", 3 * 2**29), ("4 KiB", 4096)]
)
def test_the_caches_memory_may_have_a_unit(given: str | int, num_bytes: int) -> None:
    settings = load_settings({"kv_cache_memory": given})
    assert settings.engine_config(Path("m")).kv_cache_bytes == num_bytes


@pytest.mark.parametrize("given", ["1GB", "GiB", "-1", "many", "1e9", "0.0001KiB"])
def test_a_memory_that_is_no_size_is_refused(given: str) -> None:
    with pytest.raises(SettingsError, match="kv-cache-memory"):
        load_settings({"kv_cache_memory": given})


def test_lists_come_as_lists_and_with_separators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_SERVE_API_KEYS", "one,two")
    monkeypatch.setenv("AWQ_SERVE_MODEL_ROOTS", "/a:/b")
    settings = load_settings({})
    assert settings.api_keys == ("one", "two")
    assert settings.model_roots == (Path("/a"), Path("/b"))
    file = write(tmp_path / "settings.toml", 'api_keys = ["three"]\n')
    monkeypatch.delenv("AWQ_SERVE_API_KEYS")
    assert load_settings({}, file).api_keys == ("three",)
    assert load_settings({"api_keys": ["four", "five"]}).api_keys == ("four", "five")
    monkeypatch.setenv("AWQ_SERVE_ALLOWED_HOSTS", "a.lan,b.lan")
    assert load_settings({}).allowed_hosts == ("a.lan", "b.lan")


def test_a_key_file_adds_its_keys(tmp_path: Path) -> None:
    file = write(tmp_path / "keys", "one\ntwo\n")
    settings = load_settings({"api_keys": ["zero"], "api_key_file": str(file), "host": "0.0.0.0"})
    assert settings.api_keys == ("zero", "one", "two")


def test_keys_are_not_printed() -> None:
    assert "secret" not in repr(load_settings({"api_keys": ["secret"]}))


def test_settings_never_change() -> None:
    with pytest.raises(ValidationError):
        load_settings({}).port = 1


def test_home_is_expanded() -> None:
    assert load_settings({"data_dir": "~/x"}).data_dir == Path.home() / "x"
    assert load_settings({}).models_dir == load_settings({}).data_dir / "models"


def test_the_engine_gets_its_part() -> None:
    config = load_settings({"max_num_seqs": "7", "device": "cpu", "num_threads": 2}).engine_config(Path("/m"))
    assert (config.model_path, config.max_num_seqs, config.device, config.num_threads) == ("/m", 7, "cpu", 2)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.com"])
def test_a_public_address_needs_a_key_or_a_word(host: str) -> None:
    with pytest.raises(SettingsError, match="--api-key") as refusal:
        load_settings({"host": host})
    assert host in str(refusal.value)
    assert load_settings({"host": host, "api_keys": ["k"]}).host == host
    assert load_settings({"host": host, "allow_insecure_bind": True}).host == host


def test_an_empty_key_file_does_not_open_a_public_address(tmp_path: Path) -> None:
    file = write(tmp_path / "keys", "\n")
    with pytest.raises(SettingsError, match="holds no key"):
        load_settings({"host": "0.0.0.0", "api_key_file": str(file)})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_an_address_of_this_machine_needs_none(host: str) -> None:
    assert is_loopback(host)
    assert load_settings({"host": host}).host == host


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "70000"}, ["port", "65535"]),
        ({"port": "http"}, ["port", "integer"]),
        ({"max_num_seqs": "0"}, ["max-num-seqs", "1"]),
        ({"gpu_memory_utilization": "1.5"}, ["gpu-memory-utilization", "1"]),
        ({"device": "tpu"}, ["device", "'cpu'", "'cuda'"]),
        ({"prot": "1"}, ["prot", "port"]),
        ({"api_keys": [""]}, ["api-keys", "empty"]),
        ({"api_keys": ["with\nnewline"]}, ["api-keys"]),
    ],
)
def test_a_wrong_value_is_told_with_what_would_be_right(flags: dict[str, object], words: list[str]) -> None:
    with pytest.raises(SettingsError) as refusal:
        load_settings(flags)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_a_misspelt_variable_is_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_SERVE_PROT", "1")
    with pytest.raises(SettingsError, match="AWQ_SERVE_PROT"):
        load_settings({})


@pytest.mark.parametrize(("content", "words"), [("port = ", "TOML"), ("prot = 1", "prot"), ("port = 'x'", "port")])
def test_a_wrong_file_is_told(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_settings({}, write(tmp_path / "settings.toml", content))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nothing\.toml"):
        load_settings({}, tmp_path / "nothing.toml")
    with pytest.raises(SettingsError, match="nothing-keys"):
        load_settings({"api_key_file": str(tmp_path / "nothing-keys")})


def test_the_variable_of_one_key_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given one key, which may hold a comma
    monkeypatch.setenv("AWQ_SERVE_API_KEY", "one,key")
    assert load_settings({}).api_keys == ("one,key",)
    # then flags win over it, and it over the file
    file = write(tmp_path / "settings.toml", 'api_keys = ["file"]\n')
    assert load_settings({}, file).api_keys == ("one,key",)
    assert load_settings({"api_keys": ["flag"]}).api_keys == ("flag",)
    # and an empty one is none
    monkeypatch.setenv("AWQ_SERVE_API_KEY", "")
    assert load_settings({}).api_keys == ()


def test_both_variables_for_keys_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_SERVE_API_KEY", "one")
    monkeypatch.setenv("AWQ_SERVE_API_KEYS", "one,two")
    with pytest.raises(SettingsError, match="both set"):
        load_settings({})


def test_adapters_come_by_name_and_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = (AdapterConfig("a", "/one"), AdapterConfig("b", "/two=2"))
    assert load_settings({"lora": ["a=/one", "b=/two=2"]}).engine_config(Path("m")).adapters == both
    assert load_settings({}, write(tmp_path / "settings.toml", 'lora = ["a=/one", "b=/two=2"]\n')).lora == both
    monkeypatch.setenv("AWQ_SERVE_LORA", "a=/one,b=/two=2")
    assert load_settings({}).lora == both


@pytest.mark.parametrize("given", ["/only/a/path", "=/path", "name=", " name=/path", "na\nme=/path"])
def test_an_adapter_without_a_name_or_a_directory_is_refused(given: str) -> None:
    with pytest.raises(SettingsError, match="lora: an adapter is given as NAME=PATH"):
        load_settings({"lora": [given]})


def test_an_adapter_that_is_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="lora: an adapter is given as NAME=PATH"):
        load_settings({}, write(tmp_path / "settings.toml", '[[lora]]\nname = ""\npath = "one"\n'))


def test_the_draft_models_directory_may_lie_in_the_home_directory() -> None:
    assert load_settings({"draft_model": "~/small"}).draft_model == Path.home() / "small"


def test_two_adapters_of_one_name_are_refused() -> None:
    with pytest.raises(SettingsError, match="lora: two adapters are called a; give each a name of its own"):
        load_settings({"lora": ["a=/one", "a=/two"]})
