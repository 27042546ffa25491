// The theme takes keyboard focus from code that scrolls wherever it sees no mouse. Whatever scrolls can be reached here.
const reach = () => {
  for (const part of document.querySelectorAll("pre > code, .md-typeset__scrollwrap")) {
    if (part.scrollWidth > part.clientWidth) part.setAttribute("tabindex", "0");
  }
};
window.addEventListener("load", () => [0, 500, 1500].forEach((wait) => setTimeout(reach, wait)));
window.addEventListener("resize", () => setTimeout(reach, 500));
