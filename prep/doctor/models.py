"""Checks of models: those of the hub, DWPose's files, and the servers that write captions.

Nothing is downloaded. Every request has a timeout of a few seconds; credentials are sent as a run would send them and
never shown.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from nanodit.errors import PROBLEM_BREAK, ConfigError
from nanodit.files import sha256_file
from prep.captions.base import HostFault, SampleFault, ServerFacts
from prep.captions.config import CaptionConfig, CaptionHost
from prep.captions.hosts import open_server
from prep.captions.servers import SERVERS
from prep.config import PrepConfig
from prep.dataset.layers import ENCODER_LAYERS
from prep.doctor.check import DATA, RESOURCE, SETUP, Check, fail, ok, warn
from prep.doctor.node import first_line
from prep.encoders.backbones import ALEXNET, VGG16
from prep.encoders.hub import CONFIG, UNGATED, WEIGHTS, WEIGHTS_INDEX, Reference
from prep.encoders.registry import NETWORKS, encoder_of

SECONDS = 4.0  # per request
GB = 1e9
HUB = "https://huggingface.co"
GATED = "facebook/dinov3-"  # behind a licence that a person must accept
TRY_OUT = "configs/prep/quickstart.yaml"
LFS_POINTER = b"version https://git-lfs"


# --- models of the hub ------------------------------------------------------------------------------------------------


def encoder_names(config: PrepConfig) -> dict[str, str | None]:
    """Return what each encoder of the active layers is made with; None for a built-in demo network.

    By layer, but "detector" and "pose" for the two files of the pose layer.
    """
    names = {}
    for layer in ENCODER_LAYERS:
        encoder = encoder_of(layer)
        usual = encoder.files or ({layer: encoder.model} if encoder.model else {})
        for part, production in usual.items() if layer in config.active_layers else ():
            given = getattr(getattr(config, layer), part if encoder.files else "model")
            names[part] = given or (production if config.encoders == "production" else None)
    return names


def check_model(config: PrepConfig, layer: str, name: str | None) -> Check:
    """Check that the model of a layer is at hand, or can be downloaded by this machine's user."""
    label = f"model_{layer}"
    if name is None:
        return ok(label, "a built-in demo encoder; nothing to download")
    if Path(name).is_dir():
        if Path(name, CONFIG).is_file():
            return ok(label, f"the folder {name}")
        return fail(label, SETUP, f"the folder {name} holds no {CONFIG}", "give a folder made by save_pretrained")
    reference = Reference(name, getattr(config, layer).revision)
    cached = _cached_commit(reference, CONFIG)
    if cached and any(_cached_commit(reference, weights) for weights in (WEIGHTS, WEIGHTS_INDEX)):
        return ok(label, f"{reference} is in the cache ({cached[:7]})")
    return _ask_hub(label, layer, reference, (WEIGHTS, WEIGHTS_INDEX))


def check_network(config: PrepConfig, part: str, name: str | None) -> Check:
    """Check that one of DWPose's two ONNX files is there, and that it is the published one."""
    label = f"dwpose_{part}"
    if name is None:
        return ok(label, "a built-in demo network")
    if not Path(name).exists() and ":" in name:
        reference = Reference.parse(name)
        if cached := _cached_commit(reference, reference.file or CONFIG):
            return ok(label, f"{reference} is in the cache ({cached[:7]})")
        return _ask_hub(label, "pose", reference, (reference.file or CONFIG,))
    path = Path(name)
    again = f"leave pose.{part} out, and the published network is downloaded at the first run"
    if not path.is_file():
        return fail(label, DATA, f"{name} does not exist", again)
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return fail(label, DATA, f"{name} is a Git LFS pointer, not the network", again)
    from prep.encoders.pins import PUBLISHED

    sha256 = sha256_file(path)
    found = f"{name}, {path.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256[:12]}"
    published = PUBLISHED.get(path.name)
    if published is None:
        return ok(label, f"{found} (a network of your own)")
    if sha256 == published:
        return ok(label, f"{found} as published")
    return warn(
        label,
        f"{found}, but DWPose's authors published {published[:12]} under this name",
        f"if that is not on purpose, {again}",
    )


def check_downloads(config: PrepConfig, parts: Collection[str]) -> list[str]:
    """Ask for all of these models before any of them is downloaded; ``parts`` are keys of :func:`encoder_names`.

    Returns what training will lack. Raises ConfigError with a line for each model that cannot be had.
    """
    names = encoder_names(config)

    def check(part: str) -> Check:
        return (check_network if part in NETWORKS else check_model)(config, part, names[part])

    with ThreadPoolExecutor(max_workers=len(parts)) as pool:
        checks = list(pool.map(check, parts))
    problems = [f"{check.found} -> {check.fix}" for check in checks if check.status == "FAIL"]
    if problems:
        lines = [f"{len(problems)} of {len(checks)} models cannot be had, and nothing was downloaded", *problems]
        lines += [f"To try the rest without them: --config {TRY_OUT} source={config.source} base=64"]
        raise ConfigError(PROBLEM_BREAK.join(lines))
    return [f"training will need {check.found} -> {check.fix}" for check in lpips_checks() if check.status != "OK"]


def lpips_checks() -> list[Check]:
    """Check the networks of LPIPS: not needed by prep, but the first thing that training and evaluation then lack."""
    checks = []
    for name, backbone in (("lpips_metric", ALEXNET), ("lpips_loss", VGG16)):
        found = f"{backbone.network} for {backbone.purpose}: {backbone.path}"
        if not backbone.path.is_file():
            checks.append(warn(name, f"{found} is not there", backbone.remedy))
        elif not sha256_file(backbone.path).startswith(backbone.digits):
            checks.append(warn(name, f"{found} is not the published network", f"delete it; {backbone.remedy}"))
        else:
            checks.append(ok(name, f"{found} as published"))
    return checks


def _cached_commit(reference: Reference, name: str) -> str:
    """Return the commit of a file in the hub's cache; "" where it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(reference.model, name, revision=reference.revision)
    except HFValidationError:
        return ""
    return Path(path).parent.name if isinstance(path, str) else ""


def _ask_hub(label: str, section: str, reference: Reference, files: Sequence[str]) -> Check:
    """Ask the hub for the headers of the first of ``files`` that it has: what a download would meet."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        text = f"{reference} is not in the cache, and HF_HUB_OFFLINE forbids downloads"
        fix = _advice("unset HF_HUB_OFFLINE, or copy HF_HOME from a machine that has it", reference)
        return fail(label, SETUP, text, fix)
    error: Exception | None = None
    for name in files:
        try:
            # a mirror given by HF_ENDPOINT is in the URL; the user's token is sent as for a download
            url = hf_hub_url(reference.model, name, revision=reference.revision)
            found = get_hf_file_metadata(url, timeout=SECONDS)
        except RemoteEntryNotFoundError as missing:
            error = missing
            continue
        except Exception as refusal:  # of urllib, httpx or the hub, as the case may be
            error = refusal
            break
        size = f", {found.size / GB:.1f} GB" if found.size and found.size > GB / 10 else ""
        return ok(label, f"{reference} will be downloaded at the first run ({(found.commit_hash or '')[:7]}{size})")
    assert error is not None
    return _refused(label, section, reference, error)


def _advice(text: str, reference: Reference) -> str:
    """Return ``text``, preceded by the licence for models that have one to accept."""
    if not reference.model.startswith(GATED):
        return text
    licence = f"accept its licence at {HUB}/{reference.model} and run `hf auth login`"
    return f"{licence}{', then ' if text else ''}{text}; without a licence: --config {UNGATED}"


def _refused(label: str, section: str, reference: Reference, error: Exception) -> Check:
    from huggingface_hub import constants, errors

    model = reference.model
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        found, fix = f"{model!r} is neither a folder here nor a name on the hub", f"correct {section}.model"
    elif isinstance(error, errors.GatedRepoError):
        found = f"{model} is gated, and the hub does not let you download it ({status})"
        fix = _advice("", reference) or f"request access at {HUB}/{model}, then `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        found, fix = f"{model} has no revision {reference.revision}", f"set {section}.revision to a commit that exists"
    elif isinstance(error, errors.RemoteEntryNotFoundError):
        found, fix = f"{model} has no weights that can be read here", "give a folder made by save_pretrained"
    elif isinstance(error, errors.RepositoryNotFoundError):
        found = f"the hub shows you no model {model} ({status})"
        fix = f"check the name at {HUB}/{model}; a private one needs `hf auth login`"
    elif status in (401, 403):
        found, fix = f"the hub refuses your token ({status})", f"`hf auth login` with a token that may read {model}"
    elif status:
        return fail(label, RESOURCE, f"the hub answers {status} for {model}", "wait a few minutes and try again")
    else:
        fix = "connect this machine, or copy HF_HOME from one that has it"
        found = f"{reference} is not in the cache, and {urlsplit(constants.ENDPOINT).netloc} does not answer"
        return fail(label, RESOURCE, found, _advice(fix, reference))
    return fail(label, SETUP, found, fix)


# --- captions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoAnswer:
    """The reason why a caption server did not answer.

    ``code`` is SETUP when somebody must set something right, RESOURCE when the server is away.
    """

    reason: str
    code: int = RESOURCE


def examine_server(host: CaptionHost, captions: CaptionConfig) -> ServerFacts | NoAnswer:
    """Ask a caption server as a run would."""
    parts = urlsplit(host.url if "://" in host.url else f"http://{host.url}")
    try:
        # here, where a slow name server holds up nobody: asyncio would wait for it at its end
        socket.getaddrinfo(parts.hostname, parts.port)
        return asyncio.run(_examine(host, captions.model_copy(update={"timeout": SECONDS})))
    except ConfigError as error:
        return NoAnswer(str(error).removeprefix(f"caption host {host.url} "), SETUP)
    except (HostFault, SampleFault, OSError) as error:
        return NoAnswer(first_line(str(error)))


async def _examine(host: CaptionHost, captions: CaptionConfig) -> ServerFacts:
    server = open_server(host, captions)
    try:
        return await server.examine()
    finally:
        await server.close()


def server_checks(answers: Mapping[str, ServerFacts | NoAnswer], captions: CaptionConfig) -> list[Check]:
    """Return one check per caption host (``node``) and one for whether they serve the same build of the model."""
    kind = SERVERS[captions.backend]
    up = {host: answer for host, answer in answers.items() if isinstance(answer, ServerFacts)}
    checks = []
    for host, answer in answers.items():
        checks.append(replace(_server(answer, captions, others=bool(up)), node=host))
    digests = sorted({answer.digest for answer in up.values()})
    versions = sorted({answer.version for answer in up.values() if answer.version})
    model = captions.model
    if captions.digest and any(digest != captions.digest for digest in digests):
        found = f"{model} is {', '.join(map(_short, digests))}, but captions.digest asks for {_short(captions.digest)}"
        checks.append(fail("caption_model", SETUP, found, "pull that build on every host, or set captions.digest=null"))
    elif len(digests) > 1:
        found = f"the hosts serve different builds of {model}: {', '.join(map(_short, digests))}"
        checks.append(fail("caption_model", SETUP, found, kind.reload.format(model=model)))
    elif len(versions) > 1:
        found = f"the hosts run {kind.program} {' and '.join(versions)}"
        checks.append(warn("caption_model", found, "update the older ones: equal captions need equal programs"))
    elif len(up) > 1:
        checks.append(ok("caption_model", f"the same build of {model} on {len(up)} hosts"))
    return checks


def _server(answer: ServerFacts | NoAnswer, captions: CaptionConfig, others: bool) -> Check:
    name = captions.backend
    if isinstance(answer, ServerFacts):
        version = f"{answer.version} " if answer.version else ""
        memory = f"; models hold {answer.memory / GB:.1f} GB of GPU memory now" if answer.memory else ""
        return ok(name, f"{version}has {captions.model} ({_short(answer.digest)}){memory}")
    if answer.code == SETUP:
        found, _, fix = answer.reason.partition(". ")
        return fail(name, SETUP, found, fix or "correct the captions section of the config")
    fix = f"{SERVERS[name].start.format(model=captions.model)}, or correct captions.hosts"
    # a run goes on with the other hosts
    return warn(name, answer.reason, fix) if others else fail(name, RESOURCE, answer.reason, fix)


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
