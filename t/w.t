my $fn=sub ($path,$name,$size,$file,$step,$struct=0) {
  my $s=open_export($path,$name); open my $fh,'>:raw',$file; for(my $o=0;$o<$size;$o+=$step){ my $l=$size-$o<$step?$size-$o:$step; my($e,$dd)=nbd_read($s,$o,$l); die $e if $e; print $fh $dd } close $fh };
