"""How the page looks; fonts are those of the reader's system."""

STYLE = """
*{box-sizing:border-box}body{margin:0;background:#f1f5f9;color:#111827}
body{font:15px/1.45 system-ui,"DejaVu Sans",sans-serif}
header{display:flex;gap:28px;align-items:center;padding:18px 32px;color:#fff}header h1{margin:0;font-size:21px}
header p{margin:4px 0 0;max-width:900px}.verdict{font-size:46px;font-weight:800;letter-spacing:.02em}
header.accept{background:#15803d}header.reject{background:#b91c1c}header.undecided{background:#b45309}
article small{line-height:1.3}
main{max-width:1290px;margin:0 auto;padding:16px 24px 48px}
h2{font-size:17px;margin:0 0 8px}section{margin:0 0 22px}
.card{background:#fff;border:1px solid #e2e8f0;border-radius:8px;padding:14px 16px;margin:0}
.first{display:grid;grid-template-columns:minmax(0,3fr) minmax(0,2fr);gap:16px;align-items:start}
.card h2:not(:first-child){margin-top:14px}.card p{margin:6px 0}.big{font-size:18px;font-weight:600}
.plots{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:16px}
.plots figure{grid-column:span 2}.plots .wide{grid-column:span 3}
.plots .full{grid-column:span 6}
.plots svg{width:100%;height:auto;display:block}figcaption{font-size:12.5px;color:#475569;margin-top:6px}
section>.scroll{background:#fff;border:1px solid #e2e8f0;border-radius:8px;padding:4px 10px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px}
th{text-align:left;color:#475569;font-weight:600;padding:5px 8px;border-bottom:1px solid #cbd5e1;white-space:nowrap}
td{padding:5px 8px;border-bottom:1px solid #eef2f7;font-variant-numeric:tabular-nums;vertical-align:top}
small{color:#475569}.tag{font-size:12px;font-weight:700;border-radius:4px;padding:2px 7px;color:#fff;white-space:nowrap}
.tag.accept{background:#15803d}.tag.reject{background:#b91c1c}.tag.undecided{background:#b45309}
.tag.quiet{background:#64748b}.warning{background:#fef3c7;border:1px solid #f59e0b;border-radius:8px;padding:8px 14px}
.warning{margin:0 0 12px}.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(540px,1fr));gap:14px}
.gallery p{margin:0 0 8px;overflow-wrap:anywhere}.four{display:grid;grid-template-columns:repeat(4,1fr);gap:6px}
.four figure{margin:0}.four img{width:100%;display:block;border-radius:4px}
.unknown{aspect-ratio:1;background:#e2e8f0;border-radius:4px;display:grid;place-items:center;color:#64748b}
@media(max-width:900px){.first{grid-template-columns:1fr}.plots figure,.plots .wide,.plots .full{grid-column:span 6}}
"""
