"""The server: resumed after its death, without data, and secured by TLS and keys of nodes."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.encoders import labelled_rows, write_rows
from tests.flower.deployment import PATIENCE, TLS_FILES, Deployment, deployment
from tests.flower.runs import assert_alike, recipe_of, report_of, run_locally, saved_of, write_recipe


def test_a_server_that_died_is_resumed(clients: Deployment, material: Path, tmp_path: Path) -> None:
    """Its base was changed by rounds (fedex), which the clients of the resumed run get as a whole."""
    fedex = {"adapter": "lora", "algorithm": "fedex"}
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(material, fedex, rounds=3, min_clients=3))
    folder = tmp_path / "flower"
    first = clients.run(recipe=str(recipe), overrides=f"output_dir={folder}", round_timeout=PATIENCE)
    clients.wait_for_file(folder / "federated" / "only" / "state.safetensors")
    clients.kill_server()
    before = len(saved_of(folder).rounds)
    assert before < 3
    resumed = f"output_dir={folder} resume=true"
    second = clients.run(recipe=str(recipe), overrides=resumed, round_timeout=PATIENCE)
    assert clients.wait(second) == "finished:completed", clients.output(second)
    assert f"{before} of 3 rounds are saved" in clients.output(second)
    local = run_locally(recipe, tmp_path / "local")
    assert_alike(saved_of(folder), local)
    assert clients.status(first) != "finished:completed"


def test_clients_keep_data_that_the_server_does_not_have(material: Path, tmp_path: Path) -> None:
    """Every node has the file of its own task, and the server has none: there are no figures."""
    content = recipe_of(material, {"adapter": "ia3"}, split="tasks", num_clients=None, dirichlet_alpha=None)
    task = content["tasks"]["kinds"]
    del task["validation"]
    names = ("shop", "works")
    content["tasks"] = {
        name: {**task, "train": f"{name}.jsonl", "labels": ["fruit", "metal"], "validation_fraction": 0.2}
        for name in names
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", content)
    (tmp_path / "server").mkdir()
    with deployment(tmp_path / "server", []) as own:
        for seed, name in enumerate(names):
            folder = tmp_path / name
            folder.mkdir()
            write_rows(folder / f"{name}.jsonl", labelled_rows(30, seed=seed))
            own.start_node(name, cwd=folder)
        overrides = f"output_dir={tmp_path / 'run'}"
        run = own.run(recipe=str(recipe), overrides=overrides, server_data=False, round_timeout=PATIENCE)
        assert own.wait(run) == "finished:completed", own.output(run)
    report = report_of(tmp_path / "run")
    assert report.figures == []
    assert report.heldout_examples == 0
    assert [own_round.accepted for own_round in report.strategies[0].seeds[0].rounds] == [2, 2]
    assert report.strategies[0].seeds[0].bytes_up > 0


def test_tls_and_keys_of_nodes(material: Path, tmp_path: Path) -> None:
    """A node whose key is registered takes part; one whose key is not cannot connect."""
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    make_certificates(certificates)
    content = recipe_of(material, {"adapter": "ia3"}, num_clients=1, rounds=1)
    recipe = write_recipe(tmp_path / "recipe.yaml", content)
    own = Deployment(tmp_path / "link", certificates=certificates)
    own.folder.mkdir()
    for name in ("known", "stranger"):
        key = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(key, check=True)
    try:
        own.start_link("--enable-supernode-auth")
        done = own.flwr("supernode", "register", str(tmp_path / "known.pub"), "own")
        assert done.returncode == 0, done.stdout + done.stderr
        stranger = ["--auth-supernode-private-key", str(tmp_path / "stranger"), "--max-retries", "1"]
        own.start_node("client_0", *stranger, name="stranger")
        own.start_node("client_0", "--auth-supernode-private-key", str(tmp_path / "known"))
        run = own.run(recipe=str(recipe), overrides=f"output_dir={tmp_path / 'run'}", round_timeout=PATIENCE)
        assert own.wait(run) == "finished:completed", own.output(run)
        assert own.nodes["stranger"].wait(PATIENCE) != 0
    finally:
        own.stop()
    assert saved_of(tmp_path / "run").rounds[0].accepted == 1


def make_certificates(folder: Path) -> None:
    """A certificate authority, and a certificate of 127.0.0.1 that it signed, by openssl as docs show it."""
    ca, certificate, key = (folder / name for name in TLS_FILES)
    subject = ["-subj", "/CN=flora-train test"]
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run(
        [*new, "-keyout", str(folder / "ca.key"), "-out", str(ca)], check=True, capture_output=True
    )
    request = [
        "openssl",
        "req",
        "-newkey",
        "rsa:2048",
        "-nodes",
        *subject,
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run(
        [*request, "-keyout", str(key), "-out", str(folder / "server.csr")], check=True, capture_output=True
    )
    sign = ["openssl", "x509", "-req", "-days", "2", "-copy_extensions", "copy", "-CAcreateserial"]
    signed = ["-in", str(folder / "server.csr"), "-CA", str(ca), "-CAkey", str(folder / "ca.key")]
    subprocess.run([*sign, *signed, "-out", str(certificate)], check=True, capture_output=True)
