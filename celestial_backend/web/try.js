// Sends what stands in a form of the page to the backend that gave the page, and shows the answer below it.
for (const form of document.querySelectorAll("form")) {
  const answer = form.querySelector("pre");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const body = form.querySelector("textarea"), place = form.querySelector("input");
    const asked = { method: form.dataset.method, headers: {} };
    if (body) {
      asked.body = body.value;
      asked.headers["Content-Type"] = "application/json";
    }
    answer.hidden = false;
    answer.textContent = "…";
    const started = performance.now();
    try {
      const came = await fetch(place.value.replace(/^\/+/, "") || ".", asked);
      const text = await came.text(), seconds = ((performance.now() - started) / 1000).toFixed(2);
      let shown = text;
      try { shown = JSON.stringify(JSON.parse(text), null, 2); } catch { /* no JSON */ }
      answer.textContent = `${came.status} ${came.statusText}, ${seconds} s\n${shown}`;
    } catch (error) {
      answer.textContent = `No answer: ${error.message}`;
    }
  });
  form.hidden = false;
}
