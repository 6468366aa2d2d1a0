"""The style and the script of the HTML form."""

_LIGHT = """
--bg:#fff;--fg:#1c2128;--dim:#667085;--line:#d8dee4;--old:#fdecea;--new:#e6f6ea;--head:#eef3fb;
--hit:#ffe58a;--stay:#fff6dd;color-scheme:light
""".strip()
_DARK = """
--bg:#16181d;--fg:#d7dae0;--dim:#8b93a1;--line:#30363d;--old:#3b1d1f;--new:#14331f;--head:#1f2733;
--hit:#6b5300;--stay:#3a3113;color-scheme:dark
""".strip()
_LAYOUT = """
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);
font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
header{position:sticky;top:0;z-index:2;background:var(--bg);border-bottom:1px solid var(--line);
padding:8px 34px 8px 14px}h1{font-size:15px;margin:0 0 4px}h1 small,a,s,i{color:var(--dim)}
header p{margin:0}.bar{display:flex;gap:8px;margin-top:6px;align-items:center}
#find,button{font:inherit;padding:3px 8px;color:inherit;background:var(--bg);
border:1px solid var(--line);border-radius:6px}#find{flex:0 1 340px;min-width:0}
button{cursor:pointer;white-space:nowrap}button:hover{background:var(--head)}
main{padding:8px 34px 60px 14px}details{margin:2px 0}details>details,.in{margin-left:16px}
summary{cursor:pointer;color:var(--dim)}.eq>summary{color:inherit}
.call{border-left:2px solid var(--line);padding-left:12px}
.call>summary{color:inherit;font-weight:600}
.region{border:1px solid var(--line);border-radius:6px;margin:8px 0;overflow:hidden}
h2,h3{font:inherit;font-weight:600;margin:0;padding:4px 8px;background:var(--head)}
.region>p{margin:0;padding:2px 8px 2px calc(8px + 2ch);color:var(--dim)}
.two{display:grid;grid-template-columns:1fr 1fr;gap:1px}.two>div{padding:3px 8px;min-width:0}
.old:not(:empty){background:var(--old)}.new:not(:empty){background:var(--new)}
.call>.two>div{background:none;color:var(--dim)}
.l{overflow-wrap:anywhere;padding-left:2ch;text-indent:-2ch}.two.l{text-indent:0;padding:0}
h2.l,h3.l{padding-left:calc(8px + 2ch)}.stays{background:var(--stay)}
b{font-weight:600;color:var(--dim)}a,s{text-decoration:none}a:hover{text-decoration:underline}
.hit,.two.hit>div:not(:empty){background:var(--hit)}.two.hit{background:none}
#map{position:fixed;right:4px;bottom:8px;width:18px;border:1px solid var(--line)}
#map a{position:absolute;left:1px;right:1px;min-height:4px;background:#3b82f6;border-radius:2px}
#map a.y{background:#d9a400}
@media(max-width:800px){.two{grid-template-columns:1fr}.two>div:empty{display:none}}
""".strip()

STYLE = (
    f":root{{{_LIGHT}}}:root.dark{{{_DARK}}}"
    f"@media(prefers-color-scheme:dark){{:root:not(.light){{{_DARK}}}}}\n{_LAYOUT}"
)

SCRIPT = """
const $=id=>document.getElementById(id),all=q=>[...document.querySelectorAll(q)];
function map(){const m=$('map'),h=document.documentElement.scrollHeight;m.replaceChildren();
m.style.top=document.querySelector('header').offsetHeight+6+'px';
$('open').textContent=all('details').some(e=>!e.open)?'unfold all':'fold all';
for(const e of all('.region,.stays')){const b=e.getBoundingClientRect();if(!b.height)continue;
const a=document.createElement('a');a.href='#';a.title=e.firstChild.textContent;
a.style.top=100*(b.top+scrollY)/h+'%';a.style.height=100*b.height/h+'%';
if(e.classList.contains('stays'))a.className='y';
a.onclick=v=>{v.preventDefault();e.scrollIntoView({block:'center'})};m.append(a)}}
function find(){const t=$('find').value.trim().toLowerCase();let n=0,first=null;
for(const e of all('.l')){const y=t&&e.textContent.toLowerCase().includes(t);
e.classList.toggle('hit',!!y);if(y){n++;first=first||e;
for(let d=e.closest('details');d;d=d.parentElement.closest('details'))d.open=true}}
$('found').textContent=t?n+' found':'';if(first)first.scrollIntoView({block:'center'});map()}
let wait;$('find').oninput=()=>{clearTimeout(wait);wait=setTimeout(find,200)};
$('open').onclick=()=>{const d=all('details'),o=d.some(e=>!e.open);d.forEach(e=>e.open=o);map()};
$('theme').onclick=()=>{const r=document.documentElement,
d=r.classList.contains('dark')||(!r.classList.contains('light')&&
matchMedia('(prefers-color-scheme: dark)').matches);
r.classList.toggle('light',d);r.classList.toggle('dark',!d)};
let frame;const later=()=>{cancelAnimationFrame(frame);frame=requestAnimationFrame(map)};
addEventListener('toggle',later,true);addEventListener('resize',later);map();
""".strip()
