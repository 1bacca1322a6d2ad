// Sorts and filters the budget table. Without it the table stands as it was written.
(() => {
  const table = document.querySelector("table.budget");
  const heads = [...table.tHead.querySelectorAll("th")];
  const bodies = [...table.tBodies];
  const status = document.getElementById("shown");
  const key = (body, column) => {
    const cell = body.rows[0].cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  };
  const blank = (body, column) => body.rows[0].cells[column].classList.contains("blank");

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      bodies.sort((a, b) => {
        const gap = blank(a, column) - blank(b, column); // what was not measured stays last
        if (gap) return gap;
        const [x, y] = [key(a, column), key(b, column)];
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return up ? order : -order;
      });
      table.append(...bodies);
    });
  });

  const select = document.getElementById("target");
  const filter = () => {
    for (const body of bodies) body.hidden = select.value !== "" && body.dataset.target !== select.value;
    status.textContent = `${bodies.filter((body) => !body.hidden).length} of ${bodies.length} rows shown`;
  };
  select.addEventListener("change", filter);
  document.querySelector(".bar").hidden = false;
  filter();
})();
