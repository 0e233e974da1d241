"""nginx in front of a SuperLink: SuperNodes may call the Fleet API, nobody may call anything else.

A SuperLink has its Fleet, Control and Runtime APIs on one port, and the last two know no users:
whoever reaches them runs code at the server and at every partner. nginx keeps the network out; all
who may log in to the server's machine still reach that port, so nobody but its operator should.
"""

from __future__ import annotations

import socket
from string import Template


class _Conf(Template):
    delimiter = "%"  # nginx has variables of its own behind the dollar


_CONF = _Conf("""\
# Made by `dept federation init`. Certificates are looked up from this file's folder, all else
# from the folder named by `nginx -p`, which is the same one.
worker_processes 1;
pid nginx.pid;
error_log error.log warn;

events {
    worker_connections 512;  # a request takes two: the SuperNode's and the SuperLink's
}

http {
    # The one list of what passes, compared with the request as it was sent: each call of a
    # SuperNode is one plain word, so that escapes, dots, slashes and queries have no place here.
    map "$request_method $request_uri" $passes {
        default 0;
        "~^POST /v1/fleet/[a-z-]+$" 1;
        "GET /health" 1;
    }

    # What every SuperNode repeats every few seconds would only hide the rest.
    map "$status $uri" $logged {
        default 1;
        "200 /health" 0;
        "200 /v1/fleet/pull-messages" 0;
        "200 /v1/fleet/send-node-heartbeat" 0;
    }
    log_format calls '$time_iso8601 $remote_addr "$request" $status '
                     'in=$request_length out=$bytes_sent seconds=$request_time';
    access_log access.log calls if=$logged;
    server_tokens off;

    # Flower sends a model in objects of 5 MiB. One always fits into memory: nothing of a model
    # is written to disk, and a worker needs no folder that it may write to.
    client_max_body_size 8m;
    client_body_buffer_size 8m;
    proxy_max_temp_file_size 0;
    client_body_temp_path temp-body;
    proxy_temp_path temp-proxy;
    fastcgi_temp_path temp-fastcgi;
    uwsgi_temp_path temp-uwsgi;
    scgi_temp_path temp-scgi;

    # A SuperNode has four requests under way at most; more of them may share one address. With
    # fewer connections than the burst allows, too many requests are slowed down, never refused.
    limit_conn_zone $binary_remote_addr zone=connections:10m;
    limit_req_zone $binary_remote_addr zone=requests:10m rate=200r/s;
    limit_conn connections 64;
    limit_req zone=requests burst=200 delay=100;
    limit_req_log_level warn;  # refusals; delays are one level below
    client_header_timeout 15s;
    client_body_timeout 60s;
    send_timeout 60s;

    ssl_certificate ../server/server.crt;
    ssl_certificate_key ../server/server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
    ssl_session_cache shared:sessions:1m;

    # The name is one that both certificates hold: nginx does not compare IP addresses.
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate ../ca.crt;
    proxy_ssl_name localhost;
    proxy_ssl_protocols TLSv1.2 TLSv1.3;
    proxy_http_version 1.1;
    proxy_connect_timeout 5s;
    proxy_send_timeout 30s;
    proxy_read_timeout 40s;  # SuperNodes themselves wait for 30

    # Nothing that a caller says of where it comes from or what it asked for is passed on.
    proxy_set_header Host $proxy_host;
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Proto https;
    proxy_set_header Forwarded "";

    server {
%listen
        if ($passes = 0) {
            return 404;
        }
        # Both with a path of their own: nginx then sends the path that it compared, tidied up.
        location /v1/fleet/ {
            proxy_pass https://127.0.0.1:%superlink_port/v1/fleet/;
        }
        location = /health {
            proxy_pass https://127.0.0.1:%superlink_port/health;
        }
        location / {
            return 404;
        }
    }
}
""")


def nginx_conf(port: int, superlink_port: int) -> str:
    """The whole configuration; ../ca.crt and ../server are looked up from its folder."""
    listen = [f"        listen {port} ssl;"]
    if _has_ipv6():
        listen.append(f"        listen [::]:{port} ssl;")
    return _CONF.substitute(listen="\n".join(listen), superlink_port=superlink_port)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
