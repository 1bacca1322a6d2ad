"""The section of a source: where documents come from."""

from string import Formatter
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from eval.core.config import Frozen


class Source(Frozen):
    """Where documents come from."""

    kind: Literal["folder", "dataset", "pydoc"] = Field(
        description="`folder`: files below `path`; `dataset`: rows of a data set; `pydoc`: help of modules"
    )
    path: str = Field(
        "",
        description="folder: directory, `stdlib`, or a package: `package:NAME` (installed), "
        "`pypi:NAME==VERSION` or `npm:NAME@VERSION` (fetched once); dataset: hub id or json, csv, ...",
    )
    include: list[str] = Field(["**/*.py"], description="glob patterns of the files of a folder")
    exclude: list[str] = Field(
        [], description="shell patterns of files to leave out, such as `a/*.txt` or `*/test/*`, below `path`"
    )
    data_files: str | list[str] | None = Field(
        None, description="files, or patterns of them, of a data set of kind json, csv, text or parquet"
    )
    encoding: str = Field(
        "utf-8", description="of files without a byte order mark: folders, and data sets of json, csv or text"
    )
    config: str | None = Field(None, description="name of the data set's configuration")
    split: str = Field("train", description="split of the data set")
    revision: str | None = Field(None, description="commit, tag or branch of a data set on the hub")
    text_column: str = Field("text", description="column that holds the text")
    prompt_column: str | None = Field(
        None, description="column with given context: only the text after it is learned and scored"
    )
    prompt_template: str | None = Field(
        None, description="the same from several columns, such as `Q: {question} A: `; null is nothing"
    )
    messages_column: str | None = Field(
        None,
        description="column with chats (`role`, `content` or `from`, `value`), laid out by the tokenizer's "
        "template; the last answer is the text",
    )
    tools_column: str | None = Field(
        None,
        description="column with the tools of a chat, for the template: a list of JSON schemas, or its JSON",
    )
    id_column: str | None = Field(
        None, description="column that names each row; none: a hash of its content does"
    )
    group_column: str | None = Field(
        None, description="column of what is never parted by a split: author, repository, conversation"
    )
    group_by_folder: bool = Field(False, description="the files of each top folder are such a group")
    streaming: bool | None = Field(
        None,
        description="read a data set of the hub, or Parquet files, row by row, and no more rows than "
        "`documents` asks for; else it is downloaded and converted first; none: where it asks for a number",
    )
    text_after: str | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="only what follows its first place is taken: `\\n\\n` leaves the head of a mail out",
    )
    label: str | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="for `task: classification`: one of `data.labels`, of all documents of the source",
    )
    label_column: str | None = Field(
        None, exclude_if=lambda value: value is None, description="the same from a column"
    )
    label_by_folder: bool = Field(
        False, exclude_if=lambda value: not value, description="the same: the name of the folder of each file"
    )
    domain_column: str | None = Field(None, description="column that names the domain of each row")
    domain: str | None = Field(
        None, description="one domain for all documents; a folder's default is the top folder of each file"
    )
    weight: float | None = Field(
        None,
        gt=0,
        description="share of the training tokens, relative to the other sources; rows are drawn by it, none "
        "twice, until a source has no more",
    )
    documents: int | None = Field(
        None,
        gt=0,
        description="at most so many documents: of a folder the first by hash, of a data set the first rows",
    )

    @model_validator(mode="after")
    def columns_fit(self) -> Self:
        prompts = {
            name: getattr(self, name) for name in ("prompt_column", "prompt_template", "messages_column")
        }
        if len(given := [name for name, value in prompts.items() if value]) > 1:
            raise ValueError(f"give one of {' and '.join(f'`{name}`' for name in given)}")
        if self.tools_column and not self.messages_column:
            raise ValueError("`tools_column` needs `messages_column`: a template writes both")
        named = self.id_column or self.group_column or self.domain_column or self.label_column
        if self.kind != "dataset" and (given or named):
            raise ValueError(f"`kind: {self.kind}` has no columns: take `kind: dataset`")
        if self.kind != "folder" and self.group_by_folder:
            raise ValueError("`group_by_folder` is for `kind: folder`; a data set has `group_column`")
        if self.kind != "folder" and self.label_by_folder:
            raise ValueError("`label_by_folder` is for `kind: folder`; a data set has `label_column`")
        if [self.label is not None, self.label_column is not None, self.label_by_folder].count(True) > 1:
            raise ValueError("give one of `label`, `label_column` and `label_by_folder`")
        if self.has_labels and given:
            raise ValueError(f"a labelled text has no `{given[0]}`")
        return self

    @field_validator("encoding")
    @classmethod
    def encoding_is_known(cls, value: str) -> str:
        try:
            "".encode(value)
        except LookupError as error:
            raise ValueError(f"{error}; give a name that Python knows, such as latin-1 or utf-16") from error
        return value

    @field_validator("prompt_template")
    @classmethod
    def template_is_readable(cls, value: str | None) -> str | None:
        names = [name for _, name, form, kind in Formatter().parse(value or "") if name is not None]
        forms = [form or kind for _, name, form, kind in Formatter().parse(value or "") if name is not None]
        if value is not None and (not all(names) or not names or any(forms)):
            raise ValueError("expected columns in braces, such as `{question}`")
        return value

    @property
    def has_labels(self) -> bool:
        return self.label is not None or self.label_column is not None or self.label_by_folder

    @property
    def patterns(self) -> list[str]:
        """`data_files` as a list."""
        return [self.data_files] if isinstance(self.data_files, str) else self.data_files or []
