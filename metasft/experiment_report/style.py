"""The style sheet of the report's page: light and dark by the reader's preference, and for paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c1e21; --faint: #5a6068; --line: #d5d9de; --wash: #f4f6f8; --link: #0b57b0;
  --good: #14602f; --good-wash: #e2f3e7; --bad: #9c1c1c; --bad-wash: #fbe6e4; --open: #70500a; --open-wash: #fbf0d5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --ink: #e4e7ea; --faint: #a3abb4; --line: #393f46; --wash: #1f2327; --link: #86b7f5;
    --good: #86d9a0; --good-wash: #183523; --bad: #f5a39b; --bad-wash: #3d1d1b; --open: #e9c873; --open-wash: #362b12;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body {
  margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 78rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.4rem; margin: 3rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
p, li { max-width: 80ch; }
ul { padding-left: 1.3rem; }
li { margin: 0.25rem 0; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; list-style: none; padding: 0; margin: 0 0 1.5rem; }
nav li { margin: 0; }
code, pre { font: 0.875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre {
  background: var(--wash); border: 1px solid var(--line); border-radius: 6px; padding: 0.75rem 1rem;
  overflow-x: auto; max-height: 28rem;
}
.table { overflow-x: auto; margin: 1rem 0 1.5rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 0.4rem; }
th, td { padding: 0.4rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 10rem; }
tbody tr:hover { background: var(--wash); }
th.n, td.n { text-align: right; }
td.n { white-space: nowrap; }
td.n .small { white-space: normal; min-width: 8rem; }
.small { display: block; color: var(--faint); font-size: 0.85em; font-weight: 400; }
.badge { display: inline-block; padding: 0 0.5em; border-radius: 0.7em; white-space: nowrap; border: 1px solid; }
.badge.good { color: var(--good); background: var(--good-wash); }
.badge.bad { color: var(--bad); background: var(--bad-wash); }
.badge.open { color: var(--open); background: var(--open-wash); }
.badge.none { color: var(--faint); background: var(--wash); }
.verdict {
  border: 1px solid var(--line); border-left: 6px solid; border-radius: 6px;
  padding: 0.75rem 1.25rem; margin: 1rem 0;
}
.verdict .title { font-size: 1.25rem; font-weight: 650; margin: 0.25rem 0 0.5rem; }
.verdict.good { border-left-color: var(--good); background: var(--good-wash); }
.verdict.bad { border-left-color: var(--bad); background: var(--bad-wash); }
.verdict.open { border-left-color: var(--open); background: var(--open-wash); }
.verdict.none { border-left-color: var(--faint); background: var(--wash); }
figure { margin: 1.25rem 0 2rem; }
figure a { display: block; background: #ffffff; border: 1px solid var(--line); border-radius: 6px; padding: 0.75rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--faint); font-size: 0.9rem; margin-top: 0.5rem; max-width: 90ch; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 500; color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  figure, .verdict, tr { break-inside: avoid; }
  .table { overflow: visible; }
}
"""
