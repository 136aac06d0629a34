"""agent.toml: strict, and every message says what, where and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edge_agent.addresses import Listen, Subscription, covers
from edge_agent.agent import _priorities, _uplink_config
from edge_agent.cli import main
from edge_agent.config import gpsd_address, load
from edge_agent.contract.errors import ConfigError
from edge_agent.core.fix import Precision

CONTRACTS = Path(__file__).parents[2] / "contracts"


def write(folder: Path, change: str = "") -> Path:
    """A working agent.toml with its documents, after one change, `old=>new`."""
    for name in ("turbofan.odcs.yaml", "zones.geojson"):
        shutil.copy(CONTRACTS / name, folder)
    text = """
device = "plane-01"
state_dir = "state"
zones = "zones.geojson"

[sensors]
url = "mqtt://127.0.0.1:1883"
subscribe = "sensors/plane-01/#"

[[streams]]
contract = "turbofan.odcs.yaml"

[position]
source = "static"
lat = 50.0
lon = 9.0

[[endpoints]]
name = "eu"
url = "mqtt://127.0.0.1:18831"
"""
    if change:
        old, new = change.split("=>")
        assert old in text
        text = text.replace(old, new)
    path = folder / "agent.toml"
    path.write_text(text)
    return path


RELEASES = '[releases]\nurl = "https://h"\nroot = "zones.geojson"\n[position]'


def test_a_good_config_is_read_with_its_documents(tmp_path: Path) -> None:
    config = load(write(tmp_path))
    assert config.fixed_lane == "europe"
    assert config.contracts[0].topic == "sensors/plane-01/turbofan"
    (sensors,) = config.sensors
    assert isinstance(sensors, Subscription) and sensors.client_id == "fenceline-plane-01"
    assert (sensors.broker.host, sensors.broker.port, sensors.broker.tls) == ("127.0.0.1", 1883, None)
    assert config.state_dir == tmp_path / "state"


def test_uplink_settings_reach_the_state_machines(tmp_path: Path) -> None:
    text = """[uplink]
deadline_ms_min = 60
hedge_share_max = 0.2
heartbeat_s = 5
failback_s = 3
backoff_s_max = 8
replay_bytes_per_s = 20000

[position]"""
    config = _uplink_config(load(write(tmp_path, f"[position]=>{text}")))
    limits = config.limits
    assert (limits.deadline.floor_s, limits.hedge_share_max, limits.heartbeat_s, limits.replay_bytes_per_s) == (0.06, 0.2, 5.0, 20_000.0)
    assert (config.routing.failback_s, config.routing.backoff_max_s) == (3.0, 8.0)


def test_what_was_refused_is_given_up_before_any_reading(tmp_path: Path) -> None:
    assert _priorities(load(write(tmp_path))) == {"turbofan": 0, "quarantine": -1}
    low = write(tmp_path, 'odcs.yaml"=>odcs.yaml"\npriority = -3')
    assert _priorities(load(low)) == {"turbofan": -3, "quarantine": -4}


def test_positions_from_gpsd_and_places_of_a_stream(tmp_path: Path) -> None:
    config = load(write(tmp_path, 'source = "static"\nlat = 50.0\nlon = 9.0=>source = "gpsd"\nspeed_m_s_max = 40.0'))
    position = config.settings.position
    assert (config.fixed_lane, gpsd_address(position.url), position.speed_m_s_max) == (None, ("127.0.0.1", 2947), 40.0)
    assert gpsd_address("gpsd://[::1]:99") == ("::1", 99)
    assert config.settings.streams[0].location is Precision.ZONE_ONLY
    rounded = load(write(tmp_path, 'odcs.yaml"=>odcs.yaml"\nlocation = "rounded"'))
    assert rounded.settings.streams[0].location is Precision.ROUNDED


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("subscribe = =>subscibe = ", r"unknown key sensors.subscibe; did you mean 'subscribe'\?"),
        ('name = "eu"=>name = "eu"\nurll = "x"', r"unknown key endpoints\[0\].urll; did you mean 'url'\?"),
        ('device = "plane-01"=>device = "Plane 1"', "device 'Plane 1' must match"),
        ('device = "plane-01"=>device = 7', r"Expected `str`, got `int` - at `\$.device`"),
        ('contract = "turbofan.odcs.yaml"=>contract = "a\\u0000b"', r"contract: '.*a\\x00b' is no path"),
        (
            '[position]=>[buffer]\nwhen_full = "block"\nbytes_max = 16777215\n[position]',
            "bytes_max 16777215 is too small .* wait for ever. Give it at least 4 times flush.bytes_max, which is 16777216, or make",
        ),
        ("turbofan.odcs.yaml=>pump.odcs.yaml", "contract: cannot read .*pump.odcs.yaml: No such file or directory; check the path"),
        ("lat = 50.0=>lat = -50.0", "lies in no zone"),
        ('name = "eu"=>name = "mars"', "endpoint 'mars' is allowed in no zone .*'eu', 'us'"),
        ('"mqtt://127.0.0.1:18831"=>"http://127.0.0.1"', "endpoint 'eu': url 'http://127.0.0.1' must be mqtt://HOST:PORT"),
        ('"mqtt://127.0.0.1:18831"=>"mqtt://127.0.0.1:port"', "endpoint 'eu': url 'mqtt://127.0.0.1:port': Port could not be cast"),
        ('"mqtt://127.0.0.1:18831"=>"mqtt://me:secret@127.0.0.1"', "without a user"),
        ('name = "eu"=>name = "eu"\npassword_file = "p"', "endpoint 'eu': password_file needs username too"),
        ('name = "eu"=>name = "eu"\nca_file = "ca.pem"', "file .*ca.pem does not exist"),
        ('source = "static"=>source = "mqtt"', "needs position.topic"),
        ('source = "static"=>source = "mqtt"\ntopic = "sensors/plane-01/+"', r"one without wildcards; it is 'sensors/plane-01/\+'"),
        ('name = "eu"=>name = "eu"\nkeepalive_s = 100000', r"Expected `int` <= 65535 - at `\$.endpoints\[0\].keepalive_s`"),
        ("[position]=>[buffer]\nage_s_max = inf\n[position]", r"Expected `float` <= 3153600000.0 - at `\$.buffer.age_s_max`"),
        ('name = "eu"=>name = "eu"\nusername = "a"\npassword_file = "latin-1"', "latin-1 is not UTF-8 text; write the password into it"),
        ('source = "static"=>source = "gpsd"\nurl = "tcp://127.0.0.1"', "position.url 'tcp://127.0.0.1' must be gpsd://HOST:PORT"),
        ('source = "static"=>source = "gpsd"\nurl = "gpsd://127.0.0.1:x"', "position.url 'gpsd://127.0.0.1:x': Port could not be cast"),
        ("lat = 50.0=>lat = 50.0\nspeed_m_s_max = 0", r"Expected `float` > 0(.0)? - at `\$.position.speed_m_s_max`"),
        ("lat = 50.0=>lat = 50.0\nhome = 'mars'", "position.home 'mars' is not a zone"),
        ('contract = "turbofan.odcs.yaml"=>contract = "turbofan.odcs.yaml"\nlocation = "near"', "Invalid enum value 'near'"),
        (
            "[position]=>[uplink]\nreceipt_timeout_s = inf\n[position]",
            r"inf is no setting; write a number - at `\$.uplink.receipt_timeout_s`",
        ),
        ("lat = 50.0=>lat = 50.0\naccuracy_m = -inf", r"-inf is no setting; write a number - at `\$.position.accuracy_m`"),
        (f"[position]=>{RELEASES}", "releases.root: .*zones.geojson is no TUF root; take the root.json that"),
        ("[sensors]=>[sensors", "not TOML"),
        ("[position]=>[flush]\nrows_max = 100000\n[position]", r"Expected `int` <= 65536 - at `\$.flush.rows_max`"),
        ("[position]=>[buffer]\nhistory_rows = 0\n[position]", r"Expected `int` >= 1 - at `\$.buffer.history_rows`"),
    ],
)
def test_a_bad_config_says_what_where_and_what_to_do(tmp_path: Path, change: str, says: str) -> None:
    (tmp_path / "latin-1").write_bytes(b"gr\xfcn")
    with pytest.raises(ConfigError, match=says):
        load(write(tmp_path, change))


def test_a_password_is_not_shown_with_the_settings(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("hunter2\n")
    config = load(write(tmp_path, 'name = "eu"=>name = "eu"\nusername = "a"\npassword_file = "p"'))
    assert config.endpoints["eu"].password == "hunter2"
    assert "hunter2" not in repr(config)


def test_a_state_directory_that_cannot_be_is_a_setting_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, 'state_dir = "state"=>state_dir = "zones.geojson"')
    assert main(["run", "--config", str(path)]) == 2
    assert "zones.geojson cannot be used: File exists; it must be a directory that the agent may write to" in capsys.readouterr().err


LISTEN = 'url = "mqtt://127.0.0.1:1883"\nsubscribe = "sensors/plane-01/#"'


@pytest.mark.parametrize(
    ("sensors", "says"),
    [
        ("", "sensors: give url and subscribe .* or listen"),
        ('url = "mqtt://127.0.0.1"', "sensors: give url and subscribe"),
        ('listen = "mqtt://127.0.0.1"\nsubscribe = "#"', r"sensors: subscribe belongs to a broker's url.*\[\[sensors\]\] table of its own"),
        ('listen = "mqtt://0.0.0.0"', "open to the network and asks nobody who he is; give users_file .* or listen on 127.0.0.1"),
        ('listen = "mqtts://0.0.0.0"\ncert_file = "c"\nkey_file = "c"', "open to the network and asks nobody who he is"),
        ('listen = "mqtt://192.0.2.1"\nusers_file = "c"', "passwords in the clear over the network; use mqtts://"),
        ('listen = "mqtt://gateway"\nusers_file = "c"', "passwords in the clear over the network; use mqtts://"),
        ('listen = "mqtts://0.0.0.0"\nusers_file = "c"', "needs cert_file and key_file"),
        ('listen = "mqtt://127.0.0.1"\nca_file = "c"', "ca_file, cert_file and key_file need an mqtts:// url"),
        ('listen = "mqtt://127.0.0.1"\nusers_file = "none"', "none does not exist; make it with: edge-agent passwd .*none USER"),
        ('url = "mqtt://h"\nsubscribe = "sensors/#/x"', "subscribe 'sensors/#/x' is no filter: .* # the whole last level"),
        ('url = "mqtt://h"\nsubscribe = ""', "subscribe '' is no filter: .* 1 to 65535 characters"),
        ('url = "mqtt://h"\nsubscribe = "sensors/{pump}/#"', r"is no filter; write \+ for a level that varies"),
        ('url = "mqtt://h"\nsubscribe = "$share/x"', r"\$share/GROUP/FILTER to share"),
        ('listen = "tcp://127.0.0.1"', "listen 'tcp://127.0.0.1' must be mqtt://HOST:PORT"),
        ('listen = "mqtt://127.0.0.1:0"', "listen 'mqtt://127.0.0.1:0' must be mqtt://HOST:PORT"),
        ('url = "mqtt://h/sensors/#"\nsubscribe = "#"', "url 'mqtt://h/sensors/#' must be .* without a user, a path or more"),
        ('listen = "mqtt://127.0.0.1"\nconnections_max = 0', "connections_max"),
        ('url = "mqtt://h"\nsubscribe = "#"\nusers_file = "c"', "users_file belongs to listen"),
        (
            'url = "mqtt://h"\nsubscribe = "sensors/plane-02/#"',
            "has the topic 'sensors/plane-01/turbofan', which no subscription",
        ),
    ],
)
def test_a_side_of_the_sensors_that_cannot_work_says_what_to_do(tmp_path: Path, sensors: str, says: str) -> None:
    (tmp_path / "c").touch()
    with pytest.raises(ConfigError, match=says):
        load(write(tmp_path, f"{LISTEN}=>{sensors}"))


def test_check_refuses_an_endpoint_whose_tls_files_do_not_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    path = write(tmp_path, '"mqtt://127.0.0.1:18831"=>"mqtts://127.0.0.1:18831"\nca_file = "ca.pem"')
    assert main(["check", "--config", str(path)]) == 2
    assert "ca.pem cert=None key=None do not load" in capsys.readouterr().err


def test_listening_to_the_network_needs_a_name_and_tls(tmp_path: Path) -> None:
    (tmp_path / "c").touch()
    secure = 'listen = "mqtts://0.0.0.0"\ncert_file = "c"\nkey_file = "c"\n'
    for who in ('users_file = "c"', 'ca_file = "c"'):
        (side,) = load(write(tmp_path, f"{LISTEN}=>{secure}{who}")).sensors
        assert isinstance(side, Listen) and (side.host, side.port, side.connections_max) == ("0.0.0.0", 8883, 512)
    for host in ("127.0.0.1", "localhost", "[::1]", "127.1.2.3"):
        (side,) = load(write(tmp_path, f'{LISTEN}=>listen = "mqtt://{host}:1999"')).sensors
        assert isinstance(side, Listen) and side.port == 1999 and side.users_file is None


def test_several_sides_cover_the_topics_together(tmp_path: Path) -> None:
    two = """url = "mqtt://a"
subscribe = "sensors/+/turbofan"
[[sensors]]
url = "mqtts://b"
version = 5
subscribe = "gps/#"
[[sensors]]
listen = "mqtt://127.0.0.1"
"""
    change = f"[sensors]\n{LISTEN}=>[[sensors]]\n{two}"
    first, second, third = load(write(tmp_path, change)).sensors
    assert isinstance(first, Subscription) and isinstance(second, Subscription) and isinstance(third, Listen)
    assert (first.client_id, second.client_id) == ("fenceline-plane-01", "fenceline-plane-01-1")
    assert (second.version, second.broker.port, second.broker.tls is not None) == (5, 8883, True)
    path = write(tmp_path, change.replace('[[sensors]]\nlisten = "mqtt://127.0.0.1"', ""))
    mqtt = 'source = "mqtt"\ntopic = "{}"'
    static = 'source = "static"\nlat = 50.0\nlon = 9.0'
    path.write_text(path.read_text().replace(static, mqtt.format("gps/fix")))
    assert len(load(path).sensors) == 2
    path.write_text(path.read_text().replace(mqtt.format("gps/fix"), mqtt.format("sensors/plane-01/position")))
    with pytest.raises(ConfigError, match=r"the position has the topic 'sensors/plane-01/position'.*add a \[\[sensors\]\] table"):
        load(path)


def test_two_sides_must_not_push_each_other_out(tmp_path: Path) -> None:
    same = f'[[sensors]]\n{LISTEN}\nclient_id = "x"\n'
    with pytest.raises(ConfigError, match="same address and client_id"):
        load(write(tmp_path, f"[sensors]\n{LISTEN}=>{same}{same}"))
    with pytest.raises(ConfigError, match=r"unknown key sensors\[1\].urll"):
        load(write(tmp_path, f"[sensors]\n{LISTEN}=>{same}[[sensors]]\nurll = 1"))


@pytest.mark.parametrize(
    ("wide", "narrow", "does"),
    [
        ("#", "a/b", True), ("a/#", "a", True), ("a/#", "a/+/c", True), ("a/+/c", "a/+/c", True), ("a/+", "a/b/c", False),
        ("a/b", "a/+", False), ("a/+/c", "a/#", False), ("a/+/#", "a", False), ("$share/g/a/#", "a/b", True), ("#", "$SYS/x", False),
        ("a/b/c", "a/b", False),
    ],
)  # fmt: skip
def test_which_filter_covers_which(wide: str, narrow: str, does: bool) -> None:
    assert covers(wide, narrow) is does


def test_a_zone_file_with_an_open_ring_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    zones = json.loads((tmp_path / "zones.geojson").read_text())
    zones["features"][0]["geometry"]["coordinates"][0].pop()
    (tmp_path / "zones.geojson").write_text(json.dumps(zones))
    with pytest.raises(ConfigError, match=r"zones\.geojson: feature 0 .* is open: it starts at .* repeat the first position at the end"):
        load(path)


def test_check_exits_0_on_a_good_config_and_2_with_the_hint_on_a_bad_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    assert main(["check", "--config", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["streams"] == {"turbofan": "1.0.0, json on sensors/plane-01/turbofan"}
    assert main(["check", "--config", str(path)]) == 0
    assert "sensors: mqtt://127.0.0.1:1883 sensors/plane-01/#\n" in capsys.readouterr().out
    path.write_text(path.read_text() + '[metrics]\nlisten = "0.0.0.0:9464"\n')
    assert main(["check", "--config", str(path)]) == 2
    assert "metrics.listen '0.0.0.0:9464' must be HOST:PORT on loopback" in capsys.readouterr().err
    path.write_text(path.read_text().replace("state_dir", "state_dirr"))
    assert main(["check", "--config", str(path)]) == 2
    assert "did you mean 'state_dir'?" in capsys.readouterr().err


def test_without_its_config_every_command_says_how_to_give_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["check"], ["run"], ["status"], ["fsck"], ["export", "--csv"]):
        assert main(command) == 2
        hint = "edge-agent: cannot read agent.toml: No such file or directory; give the agent's settings with --config FILE\n"
        assert capsys.readouterr() == ("", hint)
