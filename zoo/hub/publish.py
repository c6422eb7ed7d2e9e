"""Upload to the Hub: everything staged and checked first, then one commit, then read back.

What makes it safe to interrupt and to repeat: files are sent before the commit and are found again by their hash; the commit names
the state it was made on (`parent_commit`), so it lands once or not at all; after a lost answer the repository is compared with
the folder before anything is sent again."""
from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Callable

from ..errors import UserError
from . import retry, stage
from .lint import check
from .record import RECORD, read_record
from .retry import retried
from .verify import contract_problems, verify

__all__ = ["Landed", "push"]


class Landed(UserError):
    """The commit is there, and what comes after it did not go well."""


def push(folder: str | Path, repo_id: str, *, private: bool | None = None, revision: str | None = None, create_pr: bool = False,
         tag: str | None = None, collection: str | None = None, token: str | None = None, sample: bool = True,
         say: Callable[[str], None] = lambda stage: None) -> str:
    """Upload `folder` (a student, pipeline, LoRA, data set or card) to `repo_id` (user/name) in one commit; returns the commit's URL.

    private: of a repository that is made now (None: the owner's default); revision: a branch, made when missing; create_pr: open a
    pull request instead of writing; tag: name the commit; collection: title of a collection of the same owner, made when missing;
    token: instead of the stored login; sample: let a fresh process download the commit and sample it, when it is a student;
    say: is told each of the four stages as it begins.

    An unchanged folder makes no commit. Raises UserError: before any request for what must not leave (unfit card, pickle, token in
    a file), for a refused login, repository or tag, when someone else pushed meanwhile, when the Hub stays away, and (naming the
    commit) for a student that was pushed and does not open. What could not be looked at is said on stderr."""
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} is not a repository name: give user/name")       # the card names it, before anything is asked
    if create_pr and tag:
        raise UserError("--create_pr commits to a request, and --tag would name that commit: tag after the merge")
    say("checking the folder")
    with tempfile.TemporaryDirectory(prefix=f"{_mark()}{os.getpid()}-", dir=_beside(folder)) as temp:
        copy, what = stage.stage(folder, temp, repo_id)
        if what == "student" and (found := contract_problems(copy, read_record(copy)[0])):
            raise UserError(f"{folder} would not be sampled as it was trained: {'; '.join(found)}")
        return _Push(copy, what, repo_id, revision, token).run(private, create_pr, tag, collection, sample, say)


def _beside(folder) -> Path | None:
    """Stage beside the folder, where hard links are possible; in the system's place when that is not writable.

    What a push that was killed on this machine left there is removed; on a shared disk, those of other machines are theirs."""
    import psutil
    parent = Path(folder).resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return None
    for left in parent.glob(f"{_mark()}*"):
        pid = left.name.removeprefix(_mark()).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return parent


def _mark() -> str:
    return f".pushing-{re.sub(r'[^A-Za-z0-9]+', '_', platform.node())}-"


class _Push:
    """One push: `copy` a staged folder of kind `what`."""

    def __init__(self, copy: Path, what: str, repo_id: str, revision: str | None, token: str | None):
        from huggingface_hub import HfApi
        self.copy, self.what, self.repo, self.revision = copy, what, repo_id, revision
        self.type = "dataset" if what == "dataset" else "model"
        self.api = HfApi(token=token)

    def run(self, private, create_pr, tag, collection, sample, say=lambda stage: None) -> str:
        say("looking at the repository")
        with self.words():
            self.licence()
            url = retried(lambda: self.api.create_repo(self.repo, private=private, exist_ok=True, repo_type=self.type))
            self.repo = url.repo_id
            self.refuse_public(private)
            refs = retried(lambda: self.api.list_repo_refs(self.repo, repo_type=self.type, include_pull_requests=create_pr))
            self.branch(refs)
            self.tag_is_free(refs, tag)
            say("sending")
            commit, link = self.commit(create_pr, refs)
        say("reading back")
        self.read_back(commit)
        if sample and self.what in ("student", "lora", "pipeline"):
            self.sample(commit)
        with self.words():
            if tag:
                self.name(commit, tag)
            if collection:
                self.collect(collection)
        return link

    @contextlib.contextmanager
    def words(self):
        """Inside, the client's errors become the user's, without the client's long traceback (it may quote headers)."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            said = retry.translate(error, self.repo)
            if said is None:
                raise
            raise said from None

    # ------------------------------------------------------------------------------------------------ before the commit
    def licence(self):
        """The card against the licences of its base models: a student inherits what they forbid. A Hub that does not answer stops the push;
        of a base that this login does not see the card's own word stands, and that is said."""
        bases = stage.card_of(self.copy).get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            try:
                data = retried(lambda: self.api.model_info(base)).card_data
            except Exception as error:
                if retry.status(error) not in (401, 403, 404):
                    raise
                print(f"note: {base} is not seen with this login ({retry.status(error)}): its licence was not compared with the card's", file=sys.stderr)
                continue
            check(self.copy, "dataset" if self.type == "dataset" else "model", data.to_dict() if data else None)

    def refuse_public(self, private):
        if private and not retried(lambda: self.api.repo_info(self.repo, repo_type=self.type)).private:
            raise UserError(f"{self.repo} exists and is public: make it private in its settings first, or push to another name")

    def branch(self, refs):
        """The branch to write to; a missing one is made from main. A tag or a commit cannot be written to."""
        name = self.revision
        if name is None or name in [b.name for b in refs.branches] or name.startswith("refs/pr/"):
            return
        if name in [t.name for t in refs.tags] or len(name) == 40 and set(name) <= set("0123456789abcdef"):
            raise UserError(f"--revision {name} of {self.repo} is a tag or a commit, which does not move: give a branch")
        retried(lambda: self.api.create_branch(self.repo, branch=name, repo_type=self.type, exist_ok=True))

    def tag_is_free(self, refs, tag):
        taken = next((t for t in refs.tags if t.name == tag), None) if tag else None
        if taken and stage.differences(self.copy, self.tree(tag)):
            raise UserError(f"the tag {tag} of {self.repo} exists and names another version ({taken.target_commit[:8]}): give another tag")

    # ------------------------------------------------------------------------------------------------ the commit
    def head(self) -> str:
        return retried(lambda: self.api.repo_info(self.repo, repo_type=self.type, revision=self.revision)).sha

    def tree(self, revision) -> dict:
        entries = retried(lambda: list(self.api.list_repo_tree(self.repo, recursive=True, revision=revision, repo_type=self.type)))
        return {e.path: e for e in entries if hasattr(e, "blob_id")}

    def commit(self, create_pr: bool, refs) -> tuple[str, str]:
        """(commit, its URL). One commit on top of the head seen first."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        parent = self.head()
        gone = self.left_over(parent)
        known = {r.ref for r in refs.pull_requests or []}
        message = {"student": "Few-step student", "card": "Model card", "dataset": "Data", "lora": "LoRA of a few-step student",
                   "pipeline": "Few-step pipeline"}[self.what]
        for attempt in range(retry.ATTEMPTS):
            operations = [CommitOperationAdd(name, str(path)) for name, path in stage.files(self.copy).items()]
            operations += [CommitOperationDelete(name) for name in gone]
            try:
                done = self.api.create_commit(self.repo, operations, commit_message=message, repo_type=self.type, revision=self.revision,
                                              parent_commit=parent, create_pr=create_pr)
                return done.oid, str(done.pr_url if create_pr and done.pr_url else done.commit_url)
            except Exception as error:
                seconds = retry.wait_for(error, attempt)
                moved = retry.status(error) in (409, 412)
                if seconds is None and not moved:
                    raise
                # The commit may be there although its answer is not.
                if landed := self.asked(parent, known, create_pr):
                    return landed
                if moved and (now := self.head()) != parent:
                    if create_pr:                       # a request is made on what is there now
                        parent, gone = now, self.left_over(now)
                        continue
                    raise UserError(f"someone else changed {self.repo} during this push (now at {now[:8]}), and nothing was overwritten: "
                                    "look at it, then push again") from None
                if attempt + 1 == retry.ATTEMPTS:
                    raise
                retry.pause(1.0 if seconds is None else seconds)
        raise AssertionError("unreachable")

    def left_over(self, parent: str) -> list[str]:
        """Parts of the student that was there before and are none of this one: its weights, and the settings beside them. They leave in the
        same commit, so that nobody loads one student's adapter with another's network; other files stay."""
        if self.what not in ("student", "pipeline"):
            return []
        ours, there = stage.files(self.copy), self.tree(parent)
        if not {RECORD, "model_index.json"} & there.keys():        # no student was there: what is, is somebody else's
            return []
        return [n for n in there if n not in ours and (n.endswith((".safetensors", ".safetensors.index.json")) or "/" in n and n.endswith(".json"))]

    def asked(self, parent: str, known: set[str], create_pr: bool) -> tuple[str, str] | None:
        """`landed`, of a Hub that may have gone away altogether: then nobody knows, and no more than that is said."""
        try:
            return self.landed(parent, known, create_pr)
        except Exception as error:
            then = "look at its pull requests before you push again" if create_pr else "push again; if it was, no second one is made"
            raise UserError(f"the connection to the Hub broke while {self.repo} was changed ({retry.said_by(error)}), and it cannot be asked whether "
                            f"the commit was made: {then}") from None

    def landed(self, parent: str, known: set[str], create_pr: bool) -> tuple[str, str] | None:
        """(commit, URL) of our commit, if it is there: what changed since holds exactly our files."""
        if create_pr:
            refs = retried(lambda: self.api.list_repo_refs(self.repo, repo_type=self.type, include_pull_requests=True))
            news = [r for r in refs.pull_requests or [] if r.ref not in known]
            for r in news:
                if not stage.differences(self.copy, self.tree(r.ref)):
                    return r.target_commit, f"{self.link()}/discussions/{r.ref.rsplit('/', 1)[1]}"
            return None
        now = self.head()
        if now == parent or stage.differences(self.copy, self.tree(now)):
            return None
        return now, f"{self.link()}/commit/{now}"

    def link(self) -> str:
        return f"{self.api.endpoint}/{'' if self.type == 'model' else self.type + 's/'}{self.repo}"

    # ------------------------------------------------------------------------------------------------ after the commit
    def read_back(self, commit: str):
        """Every file is at the commit with our hash."""
        with self.words():
            wrong = stage.differences(self.copy, self.tree(commit))
        if wrong:
            raise Landed(f"{self.repo} at {commit[:8]} differs from the folder in {', '.join(wrong[:5])}: push again")

    def sample(self, commit: str):
        found = verify(self.repo, commit, token=self.api.token)
        if found:
            raise Landed(f"{self.repo} was pushed ({commit[:8]}) but does not open as it should: {'; '.join(found)}")

    def name(self, commit: str, tag: str):
        try:
            retried(lambda: self.api.create_tag(self.repo, tag=tag, revision=commit, repo_type=self.type))
        except Exception as error:
            if retry.status(error) != 409:
                raise
            refs = retried(lambda: self.api.list_repo_refs(self.repo, repo_type=self.type))
            there = next((t.target_commit for t in refs.tags if t.name == tag), None)
            if there is None or there != commit and stage.differences(self.copy, self.tree(tag)):
                raise Landed(f"{self.repo} was pushed ({commit[:8]}) but the tag {tag} names another commit: give another tag") from None

    def collect(self, title: str):
        made = retried(lambda: self.api.create_collection(title, namespace=self.repo.split("/")[0], exists_ok=True))
        retried(lambda: self.api.add_collection_item(made.slug, self.repo, self.type, exists_ok=True))
