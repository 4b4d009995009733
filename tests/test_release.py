"""What is published: the wheel and its page on PyPI, versions and addresses that agree, and the files of GitHub."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import compiled_adam as ca
import pytest
import yaml
from conftest import ROOT

REPOSITORY = "https://github.com/compiled-adam/compiled-adam"
GITHUB = ROOT / ".github"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(f"compiled_adam-{ca.__version__}.dist-info/METADATA"))


def test_the_wheel_has_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if not name.startswith(f"compiled_adam-{ca.__version__}.dist-info/")}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "compiled_adam"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert files == set(tracked.stdout.split())
    assert "compiled_adam/py.typed" in files
    assert f"compiled_adam-{ca.__version__}.dist-info/licenses/LICENSE" in wheel.namelist()


def test_the_page_on_pypi_is_the_readme_with_whole_addresses(metadata: Message) -> None:
    page = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) > 10 and all(link.startswith("https://") for link in links)
    tag = f"v{ca.__version__}"
    for link in links:
        if link.startswith((f"{REPOSITORY}/", "https://raw.githubusercontent.com/compiled-adam/compiled-adam/")):
            file = re.fullmatch(rf".*/{tag}/([^#]+)(#.*)?", link)[1]
            assert (ROOT / file).exists(), link
    assert any(link.startswith("https://raw.") and link.endswith(".svg") for link in links)
    assert "pip install 'compiled-adam[lm]'" in page and "clone" not in page.split("```sh")[0]
    same = [line for line in page.splitlines() if line in (ROOT / "README.md").read_text().splitlines()]
    assert len(same) > 0.8 * len(page.splitlines())


def test_the_metadata(metadata: Message) -> None:
    assert metadata["Version"] == ca.__version__
    assert {address.split(", ")[1].removeprefix(REPOSITORY)[:5] for address in metadata.get_all("Project-URL")} == {
        *("", "/blob", "/issu")
    }
    versions = [name for name in metadata.get_all("Classifier") if re.search(r":: 3\.\d+$", name)]
    assert len(versions) >= 4 and "Typing :: Typed" in metadata.get_all("Classifier")


def test_versions_agree() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert ca.__version__ == newest == cited


def test_addresses_agree() -> None:
    files = [ROOT / "CITATION.cff", ROOT / "SECURITY.md", ROOT / "pyproject.toml", *GITHUB.rglob("*.yml")]
    found = [address for file in files for address in re.findall(r"https://github.com/[\w-]+/[\w-]+", file.read_text())]
    assert len(found) > 5 and set(found) == {REPOSITORY}


def workflow(name: str) -> dict:
    return yaml.safe_load((GITHUB / "workflows" / name).read_text())


def test_only_a_tag_whose_wheel_passed_its_tests_is_published() -> None:
    release = workflow("release.yml")
    assert release[True]["push"] == {"tags": ["v*"]}  # YAML reads `on` as a truth
    jobs = release["jobs"]
    assert jobs["test"]["needs"] == "build" and jobs["publish"]["needs"] == ["build", "test"]
    assert jobs["publish"]["if"] == "github.event_name == 'push'"
    allowed = {name: job.get("permissions", release["permissions"]) for name, job in jobs.items()}
    assert allowed.pop("publish") == {"id-token": "write"}
    assert all(each == {"contents": "read"} for each in allowed.values())


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_workflows_name_what_exists(name: str) -> None:
    steps = [step for job in workflow(name)["jobs"].values() for step in job["steps"]]
    script = "\n".join(step.get("run", "") for step in steps)
    for file in re.findall(r"tests/[\w/.]+", script):
        assert (ROOT / file).exists(), file
    for targets in re.findall(r"^make (.*)$", script, re.M):
        for target in targets.split():
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    extras = re.search(r"\[project.optional-dependencies\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    for row in workflow(name)["jobs"]["test"]["strategy"]["matrix"].get("include", []):
        assert set(row.get("extras", "cpu").split(",")) <= set(re.findall(r"^(\w+) = ", extras, re.M))


def test_the_tag_must_be_the_version(tmp_path: Path) -> None:
    (check,) = (step for step in workflow("release.yml")["jobs"]["build"]["steps"] if "GITHUB_REF_NAME" in str(step))
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / f"compiled_adam-{ca.__version__}-py3-none-any.whl").touch()
    for tag, code in ((f"v{ca.__version__}", 0), ("v9.9.9", 1)):
        done = subprocess.run(["bash", "-ec", check["run"]], cwd=tmp_path, env={"GITHUB_REF_NAME": tag, "PATH": "/bin"})
        assert done.returncode == code, tag


def test_forms_of_issues_ask_for_what_the_doctor_says() -> None:
    forms = [yaml.safe_load(file.read_text()) for file in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))]
    bug, config, feature = forms
    assert config["blank_issues_enabled"] and {"name", "description", "body"} <= bug.keys() & feature.keys()
    assert any("compiled-adam doctor --json" in field["attributes"]["label"] for field in bug["body"])
