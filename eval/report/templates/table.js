
// Sorts, filters and opens the budget table. Without it the table stands open, as it was written.
(() => {
  const PAGE = 200; // rows that are laid out at once
  const find = (id) => document.getElementById(id);
  const data = JSON.parse(find("rows").textContent);
  const table = document.querySelector("table.budget");
  const heads = [...table.tHead.rows[0].cells];
  const written = [...table.tBodies];
  const rows = data.keys.map((keys, place) => ({ keys, place, body: written[place], html: "" }));
  const packs = new Map();
  let sorted = rows, matching = rows, limit = PAGE;

  const unpack = async (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };

  // A row's evidence, which may have to be unpacked first.
  const evidence = async (row) => {
    const box = row.body.querySelector(".evidence");
    if (row.place >= written.length && !box.firstChild) {
      const pack = Math.floor((row.place - written.length) / data.pack);
      if (!packs.has(pack)) packs.set(pack, unpack(data.evidence[pack]));
      box.innerHTML = (await packs.get(pack))[(row.place - written.length) % data.pack];
    }
    return box;
  };
  const open = async (row, wanted) => {
    const box = await evidence(row);
    box.hidden = !wanted;
    row.body.querySelector(".open").setAttribute("aria-expanded", String(wanted));
  };
  const isOpen = (row) => row.body.querySelector(".open").getAttribute("aria-expanded") === "true";
  const ready = (row) => {
    if (!row.body) {
      const template = document.createElement("template");
      template.innerHTML = `<table>${row.html}</table>`;
      row.body = template.content.querySelector("tbody");
    }
    const button = row.body.querySelector(".open");
    if (button.disabled) {
      button.disabled = false;
      button.setAttribute("aria-expanded", "false");
      row.body.querySelector(".evidence").hidden = true;
      button.addEventListener("click", () => open(row, !isOpen(row)).then(tellAll));
    }
    return row.body;
  };

  const shown = () => matching.slice(0, limit);
  const tellAll = () => {
    const every = shown().length > 0 && shown().every(isOpen);
    find("all").textContent = every ? "Close all shown" : "Open all shown";
  };
  const number = (n) => n.toLocaleString("en");
  const draw = () => {
    const some = shown();
    table.replaceChildren(table.caption, table.tHead, ...some.map(ready));
    find("more").hidden = some.length === matching.length;
    const of = matching.length === rows.length ? "" : ` that match, of ${number(rows.length)}`;
    find("shown").textContent = `${number(some.length)} of ${number(matching.length)} rows shown${of}`;
    tellAll();
  };
  const filter = () => {
    const [target, word] = [find("target").value, find("word").value];
    const name = find("name").value.trim().toLowerCase();
    matching = sorted.filter(({ keys }) => (!target || keys[1] === target) && (!word || keys[2] === word)
      && keys[0].toLowerCase().includes(name));
    limit = PAGE;
    draw();
  };
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const sort = (column, up) => {
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
    sorted = [...sorted].sort(({ keys: { [column]: a } }, { keys: { [column]: b } }) => {
      if (a === null || b === null) return (a === null) - (b === null); // what was not measured stays last
      return (typeof a === "number" ? a - b : compare(a, b)) * (up ? 1 : -1);
    });
    filter();
  };

  const start = () => {
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      button.disabled = false;
      button.addEventListener("click", () => sort(column, head.getAttribute("aria-sort") !== "ascending"));
    });
    for (const id of ["target", "word", "name"]) find(id).addEventListener("input", filter);
    find("all").addEventListener("click", async () => {
      const wanted = !shown().every(isOpen);
      await Promise.all(shown().map((row) => open(row, wanted)));
      tellAll();
    });
    find("more").addEventListener("click", () => {
      const first = rows.length && limit;
      limit += PAGE;
      draw();
      matching[first].body.querySelector(".open").focus();
    });
    document.querySelector(".bar").hidden = false;
    draw();
  };
  if (!data.rows) return start();
  return unpack(data.rows).then((html) => {
    html.forEach((text, i) => { rows[written.length + i].html = text; });
    start();
  });
})();
